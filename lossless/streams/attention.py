"""Attention of a pass: a call for main rows and another for streams.

Knows: how the base's own attention is called for each kind of row. Does not know: where rows come from.

Attention of main rows is the base's own call over main keys; streams have a call of their own over all
keys. So main rows get the same shapes, and the same bits, whether streams are there or not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..base import exact
from ..base.attention import GROUPED, SDPA, grouped
from ..kernels import gpu, native
from .invariance import AloneRows, one_by_one
from .masks import PositionMask, Window, as_mask
from .passes import PASS, Pass

ATTENTION = "lossless_streams"


def _base_attention(module: nn.Module, implementation: str) -> Any:
    """The attention function that the base itself would call."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _window(module: nn.Module, kwargs: dict[str, Any]) -> Window:
    """How far back a layer's attention looks."""
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and number is not None and kinds[number] == "chunked_attention":
        return Window(chunk=config.attention_chunk_size)
    return Window(kwargs.get("sliding_window"))


def _in_one_call(
    plan: Pass, kwargs: dict[str, Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: list[torch.Tensor]
) -> Any:
    """What attends for all rows that are read alone; None: they attend one by one, by the base's own attention.

    masks: those that the base itself would give to some of the rows.
    """
    if kwargs.get("position_bias") is not None:
        return None
    if plan.implementation == GROUPED and all(mask.all() for mask in masks) and native.attendable(query, key, value):
        return native.attend
    if plan.exactly and not masks and plan.implementation == "sdpa" and exact.attendable(query, key, value):
        return exact.attend
    return None


def _rows_alone(
    plan: Pass, alone: AloneRows, window: Window, module: nn.Module, kwargs: dict[str, Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Main rows, each with the bits of a pass of its own: `[1, rows, heads, head_dim]`."""
    lengths = alone.lengths(key.shape[2] - query.shape[2])
    masks = [mask for length in sorted(set(lengths)) if (mask := window.mask_of_last(length)) is not None]
    if plan.implementation == GROUPED and kwargs.get("position_bias") is None and window.chunk is None and gpu.attendable(query, key, value):
        return gpu.attend_rows(query, key, value, kwargs.get("scaling"), alone.paths, window.size)
    if (by := _in_one_call(plan, kwargs, query, key, value, masks)) is not None:
        starts = None if window == Window() else [window.first(length - 1) for length in lengths]
        if (found := by(query, key, value, kwargs.get("scaling"), alone.tensors, starts)) is not None:
            return found
    attention = _base_attention(module, plan.implementation)
    takes_masks = plan.implementation in (*SDPA, "eager")  # others know the window by its size

    def attend(row: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: int) -> torch.Tensor:
        mask = as_mask(window.mask_of_last(length), row, plan.implementation) if takes_masks else None
        if row.is_cuda:
            row, keys, values = laid_out_alone(row, keys, values)
        return attention(module, row, keys, values, mask, **kwargs)[0]

    return one_by_one(attend, query, key, value, alone.calls, window.kept if takes_masks else lambda length: window.first(length - 1))


def laid_out_alone(row: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A query `[1, heads, 1, dim]`, keys and values with the very strides that they have in the base's own pass over one row.

    On a GPU attention may choose its kernel by them, and cuDNN makes a plan for each layout, which takes longer than a pass: so it finds
    those again that it made for the base.
    """
    return row.clone(memory_format=torch.contiguous_format), *(each.contiguous() for each in kept)


def attend(
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
    if plan.pieces is not None:
        return plan.pieces.leave_out(query.transpose(1, 2), module, query, key, value, kwargs), None
    window = _window(module, kwargs)
    if plan.told is not None:
        return _as_told(plan.told, window, module, kwargs, query, key, value), None
    rows, outputs = plan.main_rows, []
    if plan.main is not None:
        keys = key.shape[2] - (query.shape[2] - rows)
        main = (query[:, :, :rows], key[:, :, :keys], value[:, :, :keys]) if query.shape[2] > rows else (query, key, value)
        if plan.alone is None:
            outputs.append(_masked(plan, plan.main, window, module, kwargs, *main))
        else:
            outputs.append(_rows_alone(plan, plan.alone, window, module, kwargs, *main))
    if plan.stream is not None and query.shape[2] > rows:  # not in the lower layers
        outputs.append(_masked(plan, plan.stream, window, module, kwargs, query[:, :, rows:], key, value))
    return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), None


def _as_told(
    told: gpu.Told, window: Window, module: Any, kwargs: dict[str, Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """All rows of a pass that is captured, which have paths; raises RuntimeError for an attention that no kernel knows."""
    if kwargs.get("position_bias") is not None or window.chunk is not None or not gpu.attendable(query, key, value):
        raise RuntimeError("an attention that is not captured")
    return gpu.attend(query, key, value, kwargs.get("scaling"), told, module.layer_idx, window.size)


def _masked(
    plan: Pass, mask: PositionMask, window: Window, module: nn.Module, kwargs: dict[str, Any],
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The base's attention of some rows over the keys that they may see: `[batch, rows, heads, head_dim]`.

    With a mask, HF's own way with grouped heads is to copy each key and value for every head of its group. The heads of a
    group stand side by side as rows instead, but for a prompt's, which are to have the very bits of the base's own pass.
    """
    foldable = plan.implementation in SDPA and kwargs.get("position_bias") is None and not (plan.last_only and len(query) == 1)
    groups = query.shape[1] // key.shape[1] if foldable else 1
    seen = mask.as_mask(window, query, plan.implementation, groups)
    if seen is None or not foldable:
        return _base_attention(module, plan.implementation)(module, query, key, value, seen, **kwargs)[0]
    return grouped(kwargs.get("scaling"), query, key, value, seen)


AttentionInterface.register(ATTENTION, attend)
