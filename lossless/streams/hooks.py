"""What the projections of a pass do besides: MSA adapters and rotated values on stream rows, and few enough rows at a time.

Knows: which rows of a projection's input are streams, by the plan. Does not know: layers, attention, or caches.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..base.norms import is_norm
from ..errors import RowsUnknown
from .invariance import apart, in_pieces, rows_at
from .passes import PASS


@contextlib.contextmanager
def keeping_bits(limits: dict[nn.Module, int]) -> Iterator[None]:
    """`keep_bits`, for the time of a context."""
    before = {module: module.__dict__.get("forward") for module in limits}  # Accelerate may have put one there
    try:
        keep_bits(limits)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def keep_bits(limits: dict[nn.Module, int]) -> None:
    """From now on these projections see no more main rows at a time than keep their bits, in passes that ask for it, and these norms one. Such a pass
    raises RowsUnknown where a norm is given something else."""

    def careful(forward: Any, most: int) -> Any:
        def run(rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            plan = PASS.get()
            if plan is None or not plan.keeps_bits:
                return forward(rows, *args, **kwargs)
            return in_pieces(forward, rows, plan.main_rows, plan.main_rows if plan.alone is None else most)

        return run

    def alone(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            plan = PASS.get()
            beside = 0 if plan is None or plan.stream is None else plan.stream.rows.shape[-1]
            if plan is None or not plan.keeps_bits or (beside == 0 and (plan.alone is None or plan.main_rows == 1)):
                return forward(*args, **kwargs)
            at = rows_at(args[0], (plan.main_rows, plan.main_rows + beside)) if len(args) == 1 and not kwargs else None
            if at is None:
                raise RowsUnknown
            return apart(forward, args[0], plan.main_rows, plan.main_rows if plan.alone is None else 1, at)

        return run

    for module, most in limits.items():
        module.forward = alone(module.forward) if is_norm(module) else careful(module.forward, most)


def adapting(low_rank: Any) -> Any:
    """A forward hook that adds an MSA adapter to the stream rows of a projection's output."""

    def add(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        plan = PASS.get()
        if plan is None or (plan.nodes is None and plan.main is not None):
            return None
        nonlocal low_rank
        if low_rank.down.dtype != args[0].dtype and not low_rank.down.requires_grad:  # else it would be converted in every pass
            low_rank = copy.deepcopy(low_rank).to(args[0].dtype)
        if plan.main_rows == 0:
            return output + low_rank(args[0])
        # some families fold batch and rows into one dimension
        rows, sums = (t.unflatten(0, (plan.batch, -1)) if t.ndim == 2 else t for t in (args[0], output))
        if rows.shape[1] > plan.main_rows:
            sums[:, plan.main_rows :] += low_rank(rows[:, plan.main_rows :])
        return output

    return add


def turning(num_streams: int) -> Any:
    """A forward hook that turns the values of stream j by j pi / (2 gamma), pair by pair: they tell streams apart."""
    angles = torch.arange(1, num_streams + 1) * (torch.pi / (2 * num_streams))

    def turn(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        plan = PASS.get()
        if plan is None or output.shape[1] == plan.main_rows:
            return None
        main, streams = output[:, : plan.main_rows], output[:, plan.main_rows :]
        own = angles.to(output.device).repeat(streams.shape[1] // num_streams)[:, None]  # [stream rows, 1]
        cos, sin = own.cos().to(output.dtype), own.sin().to(output.dtype)
        even, odd = streams[..., 0::2], streams[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return torch.cat([main, turned], dim=1)

    return turn


def adapt(layers: nn.ModuleList, adapter: Any) -> None:
    """Hook the MSA adapters into the projections of some top layers, for their stream rows."""
    for name, low_rank in adapter.adapters():
        layers.get_submodule(name).register_forward_hook(adapting(low_rank))
    turn_values(layers, adapter)


def turn_values(layers: nn.ModuleList, adapter: Any) -> None:
    """The same for the turned values, if the adapter has them in place of stream embeddings."""
    if adapter.config.rotate_values:
        for name in (name for name, _ in adapter.adapters() if name.endswith("v_proj")):
            layers.get_submodule(name).register_forward_hook(turning(adapter.config.num_streams))
