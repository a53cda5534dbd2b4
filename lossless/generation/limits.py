"""How many rows at a time a projection, or a norm, takes without rounding otherwise.

Knows: rows that show in which order a sum was added up. Does not know: passes, or what level of exactness follows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..base.layers import decoder, device_of, features, is_projection
from ..base.norms import FusedNorm, is_norm
from ..base.packed import dense, product_dtype
from ..errors import CALLED_OTHERWISE

MOST = 32  # rows at a time that a projection is tried with
_OUTPUTS = 150_000  # numbers to compare for each of them: one in ten thousand may be all that differs


def find_limits(model: Any, own: Any = None) -> tuple[dict[nn.Module, int], dict[str, int], float]:
    """How many rows at a time each projection takes so that each has the bits that it has alone.

    Args:
        own: another model of the same structure, in whose projections a row is alone; then limits may be 0.

    Returns:
        The rows for each module; by kind; and the part of all weights that take more than one.
    """
    limits: dict[nn.Module, int] = {}
    kinds: dict[tuple[Any, ...], int] = {}
    weights = several = 0
    for module, alone in zip(projections(model), projections(own or model), strict=True):
        kind = (type(module).__name__, *features(module), product_dtype(module))
        if kind not in kinds:
            # rows are of the base's dtype, but for adapters that somebody keeps in another one, and has the rows converted for
            dtype = module.weight.dtype if type(module) is nn.Linear and module.weight.is_floating_point() else model.get_input_embeddings().weight.dtype
            kinds[kind] = _limit(module, dtype, device_of(module), alone)
        limits[module] = kinds[kind]
        size = features(module)[0] * features(module)[1]
        weights += size
        several += size * (kinds[kind] > 1)
    operations = {f"{name} {ins}x{outs}": rows for (name, ins, outs, _), rows in kinds.items()}
    return limits, operations, several / weights


def projections(model: Any) -> list[nn.Module]:
    """All of a base's, the LM head among them."""
    modules = [module for module in decoder(model).modules() if is_projection(module)]
    head = model.get_output_embeddings()
    return [*modules, *([] if head in modules else [head])]


def each_alone(model: Any) -> dict[nn.Module, int]:
    """Limits under which whatever rounds rows by their number takes them one by one."""
    return dict.fromkeys([*projections(model), *crowded_norms(model)], 1)


@torch.no_grad()
def crowded_norms(model: Any) -> list[nn.Module]:
    """The norms in which a row's sums are added up in another order beside other rows, as torch's means are on a GPU.

    That moves the last bit of a float32, and after rounding to 16 bits one number in ten thousands, which no few texts show. So each kind is tried
    in float32, and with some weight of its own.
    """
    found, kinds = [], {}
    for norm in decoder(model).modules():
        if not is_norm(norm) or isinstance(norm, FusedNorm):
            continue
        shape = next((parameter.shape for parameter in norm.parameters()), None)
        shape = shape or getattr(norm, "normalized_shape", None) or (model.config.get_text_config().hidden_size,)
        kind = type(norm), tuple(shape)
        if kind not in kinds:
            kinds[kind] = _is_crowded(norm, kind[1], device_of(norm))
        if kinds[kind]:
            found.append(norm)
    return found


def _is_crowded(norm: nn.Module, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a row of a norm, of this shape, differs beside others; on a GPU also if it cannot be tried."""
    rows = torch.randn(1, MOST, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    by = copy.copy(norm)  # with weights of its own, which may be anywhere, and nobody's hooks
    vars(by).update(_parameters={name: torch.ones(weight.shape, device=device) for name, weight in norm.named_parameters()})
    forward = type(norm).forward
    try:
        alone = torch.cat([forward(by, rows[:, [row]]) for row in range(MOST)], dim=1)
        return not all(torch.equal(forward(by, rows[:, :count]), alone[:, :count]) for count in range(2, MOST + 1))
    except CALLED_OTHERWISE:
        return device.type != "cpu"


def _limit(projection: nn.Module, dtype: torch.dtype, device: torch.device, own: nn.Module | None = None) -> int:
    """The most rows up to which no number differs from those of the same rows alone, in `own` if that is another one."""
    own = own or projection
    ins, outs = features(projection)
    count = min(256, max(16, _OUTPUTS // outs))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, ins, generator=generator, dtype=torch.float32)
    rows *= 2.0 ** (torch.arange(count)[:, None] % 6 - 2)  # rows of all sizes: 8-bit projections treat outliers apart
    rows[::2] = _cancelling(projection, rows[::2])
    rows = rows.to(device, dtype)
    most = int(own is projection)  # one row of it is alone
    alone = [own(row[None, None])[0] for row in rows[4:6]]
    if not torch.equal(projection(rows[4:6]), torch.cat(alone)):
        return most
    expected = torch.cat([own(row[None, None])[0] for row in rows])
    for size in range(most + 1, MOST + 1):
        if size > count or not torch.equal(torch.cat([projection(piece) for piece in rows.split(size)]), expected):
            break
        most = size
    return most


def _cancelling(projection: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Rows near these for which many of a projection's outputs are sums that nearly cancel: `[count, in]`.

    Such a sum shows the order in which it was added up. In others, of 16 bits, the last rounding hides it: of 50,000 numbers one
    may differ.
    """
    if (found := dense(projection)) is None or found[0].is_meta:
        return rows
    weight, bias = found[0].float().cpu(), found[1]
    some = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[: max(1, min(weight.shape[1] // 2, 128))]
    weight = weight[some]  # [fewer than in, in]
    left = rows @ weight.t() + (0 if bias is None else bias.float().cpu()[some])
    squares = weight @ weight.t()
    squares.diagonal().add_(1e-6 * squares.diagonal().mean().clamp_min(1e-30))
    return rows - torch.linalg.solve(squares, left.t()).t() @ weight
