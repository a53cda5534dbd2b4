"""How the base calls its layers, seen once, so that they can be called for other rows the same way.

Knows: which arguments of a layer depend on the rows of a pass, and how to make them. Does not know: when passes are made.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.layers import hides_where_true, own_window, position_bias, refuse_tensors_of_its_own, shares_position_bias
from .masks import Window, as_mask, side_by_side
from .passes import PASS, Pass


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
class LayerCall:
    """How the base calls one of its layers: hidden states first, then these by name; slots are filled anew."""

    given: dict[str, Any]


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


class LayerCalls:
    """The calls of a model's layers, by their numbers.

    Args:
        model: a base, or a copy of one; layers: its decoder layers.
        own_attention: they do not attend through transformers' interface, so that masks and biases are arguments of theirs.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, own_attention: bool) -> None:
        self.model, self.layers, self.own_attention = model, layers, own_attention
        self._names = [list(inspect.signature(layer.forward).parameters) for layer in layers]
        self._windows = [Window(own_window(layer)) for layer in layers] if own_attention else []
        self._seen: dict[int, LayerCall] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._seen

    def __len__(self) -> int:
        return len(self._seen)

    def hidden(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states that a layer is given: `[batch, rows, dim]`."""
        found: torch.Tensor = args[0] if args else kwargs[self._names[number][0]]
        return found

    def note(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Pass) -> dict[str, Any]:
        """Remember a call; returns its arguments besides the hidden states.

        Raises:
            UsageError: one of them cannot be made for other rows.
        """
        given = dict(zip(self._names[number], args, strict=False)) | kwargs
        del given[self._names[number][0]]
        self._seen[number] = call = LayerCall({name: named(name, value, plan) for name, value in given.items()})
        refuse_tensors_of_its_own(self.model, call.given)
        return given

    def filled(self, number: int, plan: Pass, hidden: torch.Tensor) -> dict[str, Any]:
        """A layer's arguments for the rows of this pass: main rows, streams, or both; hidden: `[batch, rows, dim]`."""
        rows = hidden.shape[1]
        main, stream = plan.main, plan.stream if rows > plan.main_rows else None

        def once(key: Any, make: Callable[[], Any]) -> Any:
            if (key, rows) not in plan.filled:
                plan.filled[key, rows] = make()
            return plan.filled[key, rows]

        def positions() -> torch.Tensor:
            return torch.cat([s.rows.expand(len(hidden), -1) for s in (main, stream) if s is not None], dim=1)

        def mask() -> torch.Tensor | None:
            seen = side_by_side(main, stream, self._windows[number])
            if seen is not None and hides_where_true(self.layers[number]):
                return ~seen
            return as_mask(seen, hidden, "eager")

        def bias() -> torch.Tensor:
            keys = (stream or main).keys.expand(len(hidden), -1).clamp_min(0)  # type: ignore[union-attr]
            found = position_bias(self.model, int(keys.max()) + 1)[:, keys].transpose(0, 1)  # [batch, heads, keys]
            return (found[0] if shares_position_bias(self.model) else found.flatten(0, 1))[:, None]

        def fill(value: Any) -> Any:
            if value is Slot.CACHE:
                return plan.cache
            if value is Slot.POSITIONS:
                return once(value, positions)
            if value is Slot.MASK:
                return once((value, self._windows[number]), mask) if self.own_attention else None
            if value is Slot.BIAS:
                return once(value, bias)
            if isinstance(value, RotaryCall):
                return once(value, lambda: value(hidden, once(Slot.POSITIONS, positions)))
            return value

        return {name: fill(value) for name, value in self._seen[number].given.items()}
