"""The key/value cache: rows are written at the end, and only accepted rows stay.

Knows: where a row's keys and values lie, and how to keep some of the last rows and forget the
others. Does not know: tokens, trees, streams, or why a row was accepted.

A pass writes its rows behind the `length` columns that hold certain rows. They stay provisional until
`keep` names the ones that were accepted: those move up in place and `length` grows; the rest is
overwritten by the next pass. Storage is allocated in blocks, so a pass copies only its own rows.

In a batch each sequence accepts its own rows (`keep_each`) and so ends at a column of its own; `visible`
says which columns hold certain rows of which sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..base.fused import Stores
from ..kernels import gpu, native

_BLOCK = 256  # rows by which the storage grows


class RowLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: `[batch, kv_heads, capacity, head_dim]`."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0  # columns of certain rows; whatever lies behind them is provisional

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(*like.shape[:2], self.capacity, like.shape[3])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[batch, kv_heads, rows, head_dim]` behind the certain rows; return views of all."""
        end = self.length + key_states.shape[2]
        self.reserve(end)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, rows: int) -> None:
        """Make room for this many rows in all."""
        if rows <= self.capacity:
            return
        self.capacity = -(-max(rows, self.capacity * 3 // 2) // _BLOCK) * _BLOCK
        if self.is_initialized:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = self._allocate(old)
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy columns `source` to columns `target`, each `[batch, count]`."""
        sequences = torch.arange(len(source), device=source.device)[:, None]
        for store in (self.keys, self.values):
            store[sequences, :, target] = store[sequences, :, source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20


class _PassingLayer(RowLayer):
    """A layer whose rows see each other, and are not kept."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


class RowCache(Cache):
    """One `RowLayer` for each decoder layer, all of one length.

    Args:
        num_layers: decoder layers of the base model.
        capacity: rows to allocate at first; grows when it must.
        padding: `[batch, prompt]`, True where a left-padded prompt has no token; None if none is padded.
        keep_from: layers below this one keep nothing: for a single pass, of which only the top layers' rows are wanted.
    """

    def __init__(self, num_layers: int, capacity: int = _BLOCK, padding: torch.Tensor | None = None, keep_from: int = 0) -> None:
        self.rows = [(RowLayer if number >= keep_from else _PassingLayer)(capacity) for number in range(num_layers)]
        self.padding, self.keep_from = padding, keep_from
        self._ends: list[int] | None = None  # of each sequence; None while all end at `length`
        self._stores: dict[tuple[int, int], Stores] = {}  # of layers that are computed together, by the number of the first, and how many
        super().__init__(layers=list(self.rows))

    @property
    def length(self) -> int:
        """Columns that hold certain rows; provisional rows are written behind them."""
        return self.rows[0].length

    def visible(self) -> torch.Tensor | None:
        """`[batch, length]`, True where a column holds a certain row of a sequence; None if all do."""
        if self._ends is None and self.padding is None:
            return None
        columns = torch.arange(self.length)
        ends = torch.tensor(self._ends or [self.length])
        visible = columns < ends[:, None]
        if self.padding is not None:
            visible = visible.repeat(len(self.padding) // len(visible), 1).to(self.padding.device)
            visible[:, : self.padding.shape[1]] &= ~self.padding[:, : self.length]  # none of it before the prompt is read
        return visible

    def places(self) -> torch.Tensor:
        """`[batch or 1, length]`: where in its text each column stands (padding before it: below 0)."""
        columns = torch.arange(self.length)[None]
        return columns if self.padding is None else columns - self.padding.sum(1, keepdim=True).cpu()

    def room(self, numbers: Sequence[int], rows: int, like: torch.Tensor) -> Stores:
        """Keys and values of these layers, `[1, kv_heads, capacity, head_dim]`, with room for so many rows behind the certain ones.

        like: `[1, kv_heads, any, head_dim]`, what keys are if the cache has none yet.
        """
        key, first, last = (numbers[0], len(numbers)), self.rows[numbers[0]], self.rows[numbers[-1]]
        found = self._stores.pop(key, None)
        # layers grow together
        if not found or first.length + rows > first.capacity or found.kept[0][0] is not first.keys or found.kept[-1][0] is not last.keys:
            found = None  # or all that grows would be held twice
            layers = [self.rows[number] for number in numbers]
            for layer in layers:
                layer.reserve(layer.length + rows)
                if not layer.is_initialized:
                    layer.lazy_initialization(like, like)
            found = Stores([(layer.keys, layer.values) for layer in layers])
        self._stores[key] = found
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """Accept these provisional rows (counted from `length`) of every sequence, in the order given."""
        self.keep_each([rows] * (self.rows[0].keys.shape[0] if self.rows[0].is_initialized else 1))

    def keep_each(self, paths: Sequence[Sequence[int]]) -> None:
        """Accept for each sequence its own provisional rows (counted from `length`), at least one each."""
        length, ends = self.length, self._ends or [self.length] * len(paths)
        if any(end < length or list(path) != list(range(len(path))) for end, path in zip(ends, paths, strict=True)):
            self._move_up(paths, ends)
        ends = [end + len(path) for end, path in zip(ends, paths, strict=True)]
        self._ends = None if min(ends) == max(ends) else ends
        for layer in self.rows:
            layer.length = max(ends)

    def _move_up(self, paths: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        """Accepted rows of each sequence go to its end."""
        kept = [(layer.keys, layer.values) for layer in self.rows if layer.is_initialized]  # not of layers that the base passes over
        if gpu.movable(kept[0][0]) and len({(each.shape, each.device) for pair in kept for each in pair}) == 1:
            gpu.move(kept, ends[0], paths[0])
            return
        if len(paths) == 1 and native.move(kept, ends[0], paths[0]):
            return
        # shorter paths repeat their last row: the same column written twice with the same value
        steps = [[min(i, len(path) - 1) for i in range(max(map(len, paths)))] for path in paths]
        source = torch.tensor([[self.length + path[i] for i in step] for path, step in zip(paths, steps, strict=True)])
        target = torch.tensor([[end + i for i in step] for end, step in zip(ends, steps, strict=True)])
        moves = {device: (source.to(device), target.to(device)) for device in {keys.device for keys, _ in kept}}
        for layer in self.rows:
            if layer.is_initialized:
                layer.move(*moves[layer.device])

    def forget(self, length: int) -> None:
        """Drop the certain rows from column `length` on, of a batch of one."""
        self._ends = None
        for layer in self.rows:
            layer.length = length

    def adopt(self, past: Any) -> None:
        """Start from the rows of another cache, one that keeps every row."""
        for layer, theirs in zip(self.rows, past.layers, strict=True):
            layer.update(theirs.keys, theirs.values)
        self.keep(range(past.get_seq_length()))

    def pass_on(self, past: Any) -> None:
        """Append to another cache the rows that it does not have yet."""
        first = past.get_seq_length()
        for number, layer in enumerate(self.rows):
            if layer.is_initialized:
                past.update(layer.keys[:, :, first : layer.length], layer.values[:, :, first : layer.length], number)

    def select(self, sequences: Sequence[int]) -> None:
        """Forget all sequences of the batch but these."""
        for layer in self.rows:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[list(sequences)], layer.values[list(sequences)]
        if self.padding is not None:
            self.padding = self.padding[list(sequences)]
        if self._ends is not None:
            ends = [self._ends[i] for i in sequences]
            self._ends = None if min(ends) == max(ends) else ends
            for layer in self.rows:
                layer.length = max(ends)
