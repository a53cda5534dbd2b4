"""What the rows of a pass may see: masks over places in a text.

Knows: main rows see what is certain and their own ancestors; a stream sees its node's main context and the
earlier streams of its node; a sliding window or a chunk cuts both by distance in the text. Does not know: models,
layers, or what is done with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..base.attention import SDPA


@dataclass(frozen=True)
class Window:
    """How far back a layer looks: everywhere, over the last `window` places, or in its own `chunk` of the text."""

    size: int | None = None
    chunk: int | None = None

    def first(self, place: int) -> int:
        """The first place that is seen from a place."""
        if self.size is not None:
            return max(0, place - self.size + 1)
        return 0 if self.chunk is None else place // self.chunk * self.chunk

    def cuts(self, key: int, row: int) -> bool:
        """Whether there is anything between a key's place and a row's that is not seen."""
        return self.first(row) > key

    def kept(self, length: int) -> int:
        """The first key that the base's own cache holds for the last place of a text of this length."""
        reach = self.size or self.chunk
        return 0 if reach is None else max(0, length - reach)

    def mask_of_last(self, length: int) -> torch.Tensor | None:
        """`[1, 1, 1, keys]`, which of those keys the last place sees; None where transformers gives a single row no mask: as long as the
        text is shorter than the reach. Attention with a mask may round otherwise than without, even if all is seen."""
        if self.kept(length + 1) == 0:
            return None
        return (torch.arange(self.kept(length), length) >= self.first(length - 1))[None, None, None]

    def sees(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`[batch, rows, keys]`, whether places of keys are within reach of places of rows, if not everything is."""
        if self.size is not None:
            return keys[:, None] > (rows - self.size)[:, :, None]
        size = self.chunk or 2**62
        return (rows // size)[:, :, None] == (keys // size)[:, None]


@dataclass
class PositionMask:
    """Which keys some rows of a pass may attend to, by each layer's reach.

    Args:
        allowed: `[batch, rows, keys]`, None if the base's attention knows by itself (one row, or plain causal).
        rows: `[batch, rows]`, keys: `[batch, keys]`, each one's place in its text.
    """

    allowed: torch.Tensor | None
    rows: torch.Tensor
    keys: torch.Tensor
    _found: dict[Any, torch.Tensor | None] = field(default_factory=dict)

    def within(self, window: Window) -> torch.Tensor | None:
        """`[batch, 1, rows, keys]`, True where a row may attend in a layer of this reach."""
        if window not in self._found:
            seen = self.allowed
            if window != Window() and window.cuts(int(self.keys.min()), int(self.rows.max())):
                near = window.sees(self.rows, self.keys)
                seen = near & (self.keys[:, None] <= self.rows[:, :, None]) if seen is None else near & seen
            self._found[window] = None if seen is None else seen[:, None]
        return self._found[window]

    def as_mask(self, window: Window, query: torch.Tensor, implementation: str, groups: int) -> torch.Tensor | None:
        """What `within` finds in the form that an attention takes, made once for all layers of a pass; for sdpa
        `[batch, 1, groups * rows, keys]`, the rows once for every head of a group."""
        form = (window, implementation, query.dtype, query.device, groups)
        if form not in self._found:
            seen = as_mask(self.within(window), query, implementation)
            self._found[form] = seen.repeat(1, 1, groups, 1) if seen is not None and implementation in SDPA else seen
        return self._found[form]


def behind_the_past(own: torch.Tensor, cache: Any, batch: int) -> torch.Tensor:
    """`[batch or 1, rows, own rows]` -> `[batch, rows, past + own rows]`: what is certain is seen as well."""
    seen = own.new_ones(batch, own.shape[1], cache.length + own.shape[2])
    seen[:, :, cache.length :] = own
    if (visible := cache.visible()) is not None:
        seen[:, :, : cache.length] = visible[:, None].to(own.device)
    return seen


def stream_mask(context: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, gamma: int, last: int) -> PositionMask:
    """What streams see: their node's main context, and streams i <= j of their own node.

    context: `[batch, nodes, main keys]`; positions: `[batch, nodes]`; keys: `[batch, main keys]`.
    Stream j of position t stands at t + j, or at the last place that the base knows.
    """
    batch, nodes, _ = context.shape
    earlier = context.new_ones(gamma, gamma).tril()
    same_node = torch.eye(nodes, dtype=torch.bool, device=context.device)
    among = torch.kron(same_node, earlier).bool().expand(batch, -1, -1)
    places = (positions[:, :, None] + torch.arange(1, gamma + 1, device=positions.device)).flatten(1).clamp_max(last)
    allowed = torch.cat([context.repeat_interleave(gamma, dim=1), among], dim=2)
    return PositionMask(allowed, places, torch.cat([keys.expand(batch, -1), places.expand(batch, -1)], dim=1))


def as_mask(allowed: torch.Tensor | None, query: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """A boolean mask in the form that the base's attention takes: as it is, or added to the scores."""
    if allowed is None:
        return None
    allowed = allowed.to(query.device)
    if implementation in SDPA:
        return allowed
    return torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(~allowed, torch.finfo(query.dtype).min)


def side_by_side(main: PositionMask | None, stream: PositionMask | None, window: Window) -> torch.Tensor | None:
    """One mask `[batch, 1, rows, keys]` for main rows and streams, for a base whose attention is its own."""
    if stream is None:
        return None if main is None else main.within(window)
    beside = stream.within(window)
    if main is None or beside is None:
        return beside
    rows = main.rows.shape[1]
    keys = main.keys.shape[1]
    allowed = beside.new_zeros(len(beside), 1, rows, beside.shape[3])
    seen = main.within(window)
    causal = (main.rows[:, :, None] >= main.keys[:, None])[:, None]
    allowed[..., :keys] = causal if seen is None else seen
    return torch.cat([allowed, beside], dim=2)
