"""The key/value cache: rows are written at the end, and only accepted rows stay.

Knows: where a row's keys and values lie, and how to keep some of the last rows and forget the
others. Does not know: tokens, trees, streams, or why a row was accepted.

A pass writes its rows behind the `length` rows that are certain. They stay provisional until
`keep` names the ones that were accepted: those move up in place and `length` grows; the rest is
overwritten by the next pass. Storage is allocated in blocks, so a pass copies only its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_BLOCK = 256  # rows by which the storage grows


class RowLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: `[batch, kv_heads, capacity, head_dim]`."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0  # certain rows; whatever lies behind them is provisional

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

    def keep(self, rows: Sequence[int]) -> None:
        """Accept provisional rows, counted from `length`, in the order given."""
        count = len(rows)
        if list(rows) != list(range(count)):  # already in place otherwise
            index = torch.tensor(rows, device=self.keys.device) + self.length
            self.keys[:, :, self.length : self.length + count] = self.keys[:, :, index]
            self.values[:, :, self.length : self.length + count] = self.values[:, :, index]
        self.length += count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20


class RowCache(Cache):
    """One `RowLayer` for each decoder layer, all of one length.

    Args:
        num_layers: decoder layers of the base model.
        capacity: rows to allocate at first; grows when it must.
    """

    def __init__(self, num_layers: int, capacity: int = _BLOCK) -> None:
        self.rows = [RowLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self.rows))

    @property
    def length(self) -> int:
        """Rows that are certain."""
        return self.rows[0].length

    def keep(self, rows: Sequence[int]) -> None:
        """Accept these provisional rows (counted from `length`) in every layer."""
        for layer in self.rows:
            layer.keep(rows)
