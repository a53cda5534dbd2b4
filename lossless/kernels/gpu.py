"""Attention of a few rows, and norms, on a GPU: kernels of ours in Triton, which comes with torch where there is CUDA.

Knows: when they can be had, whether they are right, and how tensors are handed to them. Does not know: modules, models, or trees. Of
each, a row has the same bits beside any number of others.

`Told` is what the kernels know of a pass besides its rows: where the keys and values of the past lie, how many there are, and which rows
each row sees. It stands in one tensor on the GPU, so that a captured CUDA graph can be told of another pass (streams/graphs.py).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_HEAD = 3  # numbers before the addresses: rows of the past, stride of a head, whether rows are kept
_BLOCK_BYTES, _BLOCKS = 2**14, (16, 128)  # of the keys of a block, two of which are read ahead; least and most keys of one
_UNIT = 8  # numbers that are read at once, where they lie so
_LEAST = 16  # rows of a product of matrices in Triton, at least
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs on the CPU, step by step, for tests: `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    """The module with the kernels: Triton is asked for only if something is to run there."""
    from . import triton_kernels

    return triton_kernels


@functools.cache
def available() -> bool:
    """Whether the kernels can be had here, and are right; compiled and tested at the first call."""
    if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or interpreted()):
        return False
    try:
        return _right()
    except (RuntimeError, ValueError, OSError, ImportError, AttributeError, NotImplementedError):  # no compiler for this GPU, for example
        return False


def here(tensor: torch.Tensor) -> bool:
    """Whether a tensor is where the kernels run: on the GPU that is the current one."""
    if tensor.device.type == "cuda":
        return tensor.get_device() == torch.cuda.current_device()
    return tensor.device.type == "cpu" and interpreted()


@dataclass(frozen=True, eq=False)
class Told:
    """What a pass is told: one tensor of int64, and views of it.

    Attributes:
        numbers: all of it: `[3 + 2 * layers + rows + rows * rows]`, on the device of the kernels.
        lengths: `[rows]`, of each row's path; paths: `[rows, rows]`, the rows from the root to itself.
    """

    numbers: torch.Tensor
    lengths: torch.Tensor
    paths: torch.Tensor

    @classmethod
    def over(cls, numbers: torch.Tensor, layers: int, rows: int) -> Told:
        """Views of such a tensor."""
        lengths, paths = numbers[_HEAD + 2 * layers :][: rows + rows * rows].split([rows, rows * rows])
        return cls(numbers, lengths, paths.view(rows, rows))

    @staticmethod
    def listed(past: int, kept: Sequence[tuple[torch.Tensor, torch.Tensor]], keep: bool, paths: Sequence[Sequence[int]], rows: int) -> list[int]:
        """The numbers of a pass: behind so many certain rows of these keys and values, `[1, kv_heads, capacity, dim]` of each layer, where its
        own are written if `keep`; `rows` of them, of which those without a path see themselves only."""
        told = [past, kept[0][0].stride(1), int(keep)]
        for keys, values in kept:
            told += (keys.data_ptr(), values.data_ptr())
        whole = [*paths, *([row] for row in range(len(paths), rows))]
        told += map(len, whole)
        for path in whole:
            told += (*path, *[0] * (rows - len(path)))
        return told


def attendable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` has a kernel for these here: not for values that are wider or narrower than keys, for example."""
    alike = key.shape == value.shape and query.dtype in DTYPES and key.dtype == query.dtype and here(query) and not query.requires_grad
    return alike and len(query) == 1 and query.shape[-1] <= 256 and query.shape[1] // key.shape[1] <= 64 and available()


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, told: Told, layer: int = 0, window: int | None = None
) -> torch.Tensor:
    """Softmax attention of each row over the keys of the past and of the rows on its own path.

    Args:
        query: `[1, heads, rows, dim]`; key, value: `[1, kv_heads, rows, dim]`, of the rows themselves.
        scale: of the scores; None for 1 / sqrt(dim).
        layer: number of the layer in `told`; window: how many places, its own counted, a row looks back over, None for all.

    Returns:
        `[1, rows, heads, dim]`.
    """
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    _, heads, rows, dim = query.shape
    out = torch.empty(1, rows, heads, dim, dtype=query.dtype, device=query.device)
    width, group = max(_LEAST, 1 << (dim - 1).bit_length()), heads // key.shape[1]
    block = min(_BLOCKS[1], max(_BLOCKS[0], _BLOCK_BYTES // (width * query.element_size())))
    strides = [each.stride(dimension) for each in (query, key, value) for dimension in (1, 2)]
    unit = math.gcd(_UNIT, dim, *strides)
    _kernels().attend[rows, key.shape[1]](
        query, key, value, out, told.numbers, told.lengths, told.paths, dim**-0.5 if scale is None else scale, layer, group, window or 0,
        *(stride // unit for stride in strides), told.paths.shape[1],
        DIM=dim, WIDTH=width, GROUP=max(_LEAST, 1 << (group - 1).bit_length()), BLOCK=block, FIRST=_HEAD, EXACT="ieee", UNIT=unit,
        num_warps=8 if block == _BLOCKS[1] else 4, enable_fp_fusion=False,  # fused differently in two loops, sums would be rounded differently
    )  # fmt: skip
    return out


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, paths: Sequence[Sequence[int]], window: int | None = None
) -> torch.Tensor:
    """The same of a cache that has the rows already: key, value: `[1, kv_heads, past + rows, dim]`."""
    rows = query.shape[2]
    past = key.shape[2] - rows
    key, value = (t if t.stride(2) == t.shape[3] and t.stride(3) == 1 else t.contiguous() for t in (key, value))
    if key.stride(1) != value.stride(1):
        key, value = key.contiguous(), value.contiguous()
    numbers = torch.tensor(Told.listed(past, [(key, value)], False, paths, rows)).to(query.device, non_blocking=True)
    return attend(query, key[:, :, past:], value[:, :, past:], scale, Told.over(numbers, 1, rows), 0, window)


def movable(key: torch.Tensor) -> bool:
    """Whether `move` has a kernel for keys like these, `[1, kv_heads, capacity, dim]`."""
    return len(key) == 1 and key.dtype in DTYPES and here(key) and key.is_contiguous() and available()


def move(kept: Sequence[tuple[torch.Tensor, torch.Tensor]], past: int, sources: Sequence[int]) -> None:
    """Of keys and values of all layers, alike, the rows at these places behind `past` certain ones move up to their end, in this order."""
    like = kept[0][0]
    addresses = [each.data_ptr() for pair in kept for each in pair]
    numbers = torch.tensor([*addresses, *sources]).to(like.device, non_blocking=True)
    width = 1 << (like.shape[3] - 1).bit_length()
    _kernels().move[len(addresses), like.shape[1]](
        numbers, numbers[len(addresses) :], like, len(sources), past, like.stride(1), DIM=like.shape[3], WIDTH=width
    )


def norm(rows: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """`[..., dim]` / sqrt(mean of squares + eps) * (weight + offset), `weight` `[dim]`."""
    rows, dim = rows.contiguous(), rows.shape[-1]
    out = torch.empty_like(rows)
    if rows.numel():
        _kernels().norm[(rows.numel() // dim,)](rows, weight.contiguous(), out, eps, offset, DIM=dim, WIDTH=1 << (dim - 1).bit_length(), enable_fp_fusion=False)
    return out


def add_and_norm(rows: torch.Tensor, others: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`[..., dim]` twice -> their sum, as torch rounds it, and the `norm` of that, with the same bits."""
    rows, others, dim = rows.contiguous(), others.contiguous(), rows.shape[-1]
    sums, out = torch.empty_like(rows), torch.empty_like(rows)
    _kernels().add_and_norm[(rows.numel() // dim,)](
        rows, others, weight.contiguous(), sums, out, eps, offset, DIM=dim, WIDTH=1 << (dim - 1).bit_length(), enable_fp_fusion=False
    )
    return sums, out


def turn(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of `[rows, heads, dim]` and `[rows, kv_heads, dim]` by `[rows, dim]` twice, rounded as torch's own operations are."""
    queries, keys, cos, sin = (each.contiguous() for each in (queries, keys, cos, sin))
    rows, heads, dim = queries.shape
    turned = torch.empty_like(queries), torch.empty_like(keys)
    _kernels().turn[rows, heads + keys.shape[1]](
        queries, keys, cos, sin, *turned, heads, HALF=dim // 2, WIDTH=max(2, 1 << (dim // 2 - 1).bit_length()), num_warps=1, enable_fp_fusion=False
    )
    return turned


def _right() -> bool:
    """Whether the kernels compute what torch computes, and keep the bits of a row beside others, wherever its past ends."""
    generator, there = torch.Generator().manual_seed(0), torch.device("cpu" if interpreted() else "cuda")
    query, key, value = (torch.randn(1, heads, count, 64, generator=generator, dtype=torch.float32).to(there) for heads, count in ((6, 3), (2, 150), (2, 150)))
    paths, seen = [[0], [0, 1], [0, 2]], torch.ones(3, 150, dtype=torch.bool, device=there)
    seen[0, 148:] = seen[1, 149] = seen[2, 148] = False
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    found = attend_rows(query, key, value, None, paths)
    beside = torch.cat([key[:, :, :148], key[:, :, 149:]], 2), torch.cat([value[:, :, :148], value[:, :, 149:]], 2)
    alone = attend_rows(query[:, :, 2:], *beside, None, [[0]])
    keeps = all(_keeps_bits(dtype, generator, there) for dtype in (DTYPES if there.type == "cuda" else DTYPES[:1]))
    rows = torch.randn(3, 64, generator=generator, dtype=torch.float32).to(there)
    normed = norm(rows, rows[0], 0.0, 1e-6)
    return (
        torch.allclose(found, expected, rtol=1e-4, atol=1e-4) and torch.equal(found[:, 2:], alone) and keeps
        and torch.allclose(normed, F.rms_norm(rows, (64,), rows[0], 1e-6), rtol=1e-4, atol=1e-4)
    )  # fmt: skip


def _keeps_bits(dtype: torch.dtype, generator: torch.Generator, there: torch.device) -> bool:
    """Whether the last row of a text has the same bits alone and behind a path, which crosses the blocks that keys are read in."""
    query, key, value = (torch.randn(1, heads, 130, 64, generator=generator).to(there, dtype) for heads in (6, 2, 2))
    rows = 1, 5
    found = [attend_rows(query[:, :, -count:], key, value, None, [[*range(row + 1)] for row in range(count)])[:, -1] for count in rows]
    return torch.equal(*found)
