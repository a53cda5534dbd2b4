"""One trip through the base's layers: the plan that hooks and attention go by.

Knows: which rows of a pass are the base's own and which are streams, how the base calls its top layers,
and how attention is called for each kind of row. Does not know: when passes are made, or what for.

Attention of main rows is the base's own call over main keys; streams have a call of their own over all
keys. So main rows get the same shapes, and the same bits, whether streams are there or not.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..base import kernels
from ..base.attention import GROUPED, SDPA, grouped
from .invariance import AloneRows, in_pieces, one_by_one
from .masks import Reach, Sight

ATTENTION = "lossless_streams"


class Slot(enum.Enum):
    """An argument of a decoder layer that depends on the rows of the pass."""

    CACHE = enum.auto()
    POSITIONS = enum.auto()
    MASK = enum.auto()
    BIAS = enum.auto()


@dataclass(frozen=True, eq=False)
class RotaryCall:
    """How the base made position embeddings: which module, and what else it was given."""

    module: Any
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        return self.module(hidden, positions, *self.rest, **self.kwargs)


@dataclass(frozen=True)
class Habit:
    """How the base calls one of its layers: hidden states first, then these by name; slots are filled anew."""

    given: dict[str, Any]


@dataclass
class Pass:
    """One trip through the layers: what the hooks and the attention function must know of it."""

    implementation: str  # the base's own attention
    batch: int
    main_rows: int
    main: Sight | None = None  # None: a pass of streams alone
    stream: Sight | None = None  # its keys are the main keys and those of the streams
    last_only: bool = False  # logits of the last main row only
    begin: Callable[[torch.Tensor], None] | None = None  # given the main rows at layer N - N_s, fills the next two
    nodes: torch.Tensor | None = None  # [m] main rows that speculate
    cache: Any = None
    keeps_bits: bool = False  # main rows are to have the bits of the base's own passes
    alone: AloneRows | None = None  # main rows that are read as passes of one row
    rotaries: list[tuple[RotaryCall, Any]] = field(default_factory=list)  # and what each call gave
    filled: dict[Any, Any] = field(default_factory=dict)  # what fills the layers' arguments, by rows and window
    entry: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch, main rows, dim] at layer N - N_s
    streams: torch.Tensor | None = None  # [batch, m * gamma, dim] after the final norm
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch, main rows, dim] after it


PASS: ContextVar[Pass | None] = ContextVar("lossless_pass", default=None)


@dataclass(frozen=True)
class PassOutput:
    """What a pass yields.

    Attributes:
        logits: `[batch, rows, vocab]` of the main rows that were asked for.
        entry: `[batch, rows, dim]`, the main rows at layer N - N_s, where streams start.
        streams: `[batch, nodes, num_streams, dim]` after the final norm, for the nodes that speculated.
        nodes: their rows.
    """

    logits: torch.Tensor
    entry: torch.Tensor
    streams: torch.Tensor | None = None
    nodes: tuple[int, ...] = ()


def _base_attention(module: nn.Module, implementation: str) -> Any:
    """The attention function that the base itself would call."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _reach(module: nn.Module, kwargs: dict[str, Any]) -> Reach:
    """How far back a layer's attention looks."""
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and number is not None and kinds[number] == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    return Reach(kwargs.get("sliding_window"))


def _alone(
    attention: Any, module: nn.Module, kwargs: dict[str, Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The base's attention of one row over keys that are all its own: `[1, 1, heads, head_dim]`."""
    return attention(module, query, key, value, None, **kwargs)[0]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Main rows over main keys and stream rows over all keys, each in a call of its own.

    query: `[batch, heads, rows, head_dim]`; key, value: `[batch, kv_heads, keys, head_dim]`;
    returns `[batch, rows, heads, head_dim]`.
    """
    plan = PASS.get()
    if plan is None:
        raise RuntimeError("lossless attention was called outside a pass")
    reach = _reach(module, kwargs)
    rows, outputs = plan.main_rows, []
    if plan.main is not None:
        keys = key.shape[2] - (query.shape[2] - rows)
        main = (query[:, :, :rows], key[:, :, :keys], value[:, :, :keys]) if query.shape[2] > rows else (query, key, value)
        if plan.alone is None:
            outputs.append(_masked(plan, plan.main, reach, module, kwargs, *main))
        elif plan.implementation == GROUPED and kwargs.get("position_bias") is None and kernels.attendable(*main[:2]):
            starts = None if reach == Reach() else [reach.first(length - 1) for length in plan.alone.lengths(keys - rows)]
            outputs.append(kernels.attend(*main, kwargs.get("scaling"), plan.alone.tensors, starts))
        else:
            attend = partial(_alone, _base_attention(module, plan.implementation), module, kwargs)
            outputs.append(one_by_one(attend, *main, plan.alone.calls, lambda length: reach.first(length - 1)))
    if plan.stream is not None and query.shape[2] > rows:  # not in the lower layers
        outputs.append(_masked(plan, plan.stream, reach, module, kwargs, query[:, :, rows:], key, value))
    return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), None


def _masked(
    plan: Pass, sight: Sight, reach: Reach, module: nn.Module, kwargs: dict[str, Any],
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The base's attention of some rows over the keys that they may see: `[batch, rows, heads, head_dim]`.

    With a mask, HF's own way with grouped heads is to copy each key and value for every head of its group. The heads of a
    group stand side by side as rows instead.
    """
    foldable = plan.implementation in SDPA and kwargs.get("position_bias") is None
    groups = query.shape[1] // key.shape[1] if foldable else 1
    seen = sight.as_mask(reach, query, plan.implementation, groups)
    if seen is None or not foldable:
        return _base_attention(module, plan.implementation)(module, query, key, value, seen, **kwargs)[0]
    return grouped(kwargs.get("scaling"), query, key, value, seen)


AttentionInterface.register(ATTENTION, _attend)


_SLOTS = {
    "attention_mask": Slot.MASK, "position_ids": Slot.POSITIONS, "alibi": Slot.BIAS, "position_bias": Slot.BIAS
}  # fmt: skip


def named(name: str, value: Any, plan: Pass) -> Any:
    """A layer's argument, or the slot or call that it came from."""
    if name in _SLOTS and not (_SLOTS[name] is Slot.BIAS and value is None):
        return _SLOTS[name]
    if value is plan.cache:
        return Slot.CACHE
    return next((call for call, output in plan.rotaries if output is value), value)


def note_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After the base made position embeddings: remember how, so that streams get theirs the same way."""
    plan = PASS.get()
    if plan is not None and plan.main is not None:
        given = [*args, *(kwargs.pop(name) for name in ("x", "position_ids") if name in kwargs)]
        plan.rotaries.append((RotaryCall(module, tuple(given[2:]), dict(kwargs)), output))


def following(plan: Pass, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `run` gives while hooks and attention go by this plan.

    No context manager: Ctrl-C at the entry of its exit would leave the plan behind.
    """
    before = PASS.get()
    try:
        PASS.set(plan)
        return run()
    finally:
        PASS.set(before)


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
    """From now on these projections see no more main rows at a time than keep their bits, in passes that ask for it."""

    def careful(forward: Any, most: int) -> Any:
        def run(rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            plan = PASS.get()
            if plan is None or not plan.keeps_bits:
                return forward(rows, *args, **kwargs)
            return in_pieces(forward, rows, plan.main_rows, plan.main_rows if plan.alone is None else most)

        return run

    for module, most in limits.items():
        module.forward = careful(module.forward, most)


def adapting(low_rank: nn.Module) -> Any:
    """A forward hook that adds an MSA adapter to the stream rows of a projection's output."""

    def add(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        plan = PASS.get()
        if plan is None or (plan.nodes is None and plan.main is not None):
            return None
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
