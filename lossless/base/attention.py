"""Attention of a packed model: the rows of a draft tree in one call, each with the bits that it has alone.

Knows: how transformers calls an attention by name, and two ways to attend whose rows do not hang on each other: a kernel of ours, and
where that is not to be had, torch's own for one row, the heads of a group side by side as rows of one product. Does not know:
streams, or passes. A packed model attends so (base/packed.py): it is part of what that model is, plain and accelerated alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels import gpu, native

GROUPED = "lossless_grouped"
SDPA = ("sdpa", GROUPED)  # attentions that take boolean masks, and are causal by themselves over rows that are all of their keys


def grouped(
    scaling: float | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`[batch, heads, rows, head_dim]` over `[batch, kv_heads, keys, head_dim]` -> `[batch, rows, heads, head_dim]`.

    mask: `[batch or 1, 1, groups * rows, keys]`, the rows once for every head of a group.
    """
    batch, heads, rows, _ = query.shape
    out = sdpa(query.reshape(batch, key.shape[1], -1, query.shape[-1]), key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous()


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' own attention through torch, but for one row that sees all keys (layers with a window have a mask even then)."""
    alone = query.shape[2] == 1 and kwargs.get("position_bias") is None
    if alone and (attention_mask is None or (attention_mask.dtype == torch.bool and bool(attention_mask.all()))):
        if gpu.attendable(query, key, value):
            return gpu.attend_rows(query, key, value, scaling, [[0]]), None
        if native.attendable(query, key, value):
            return native.attend(query, key, value, scaling, _ITSELF), None
        if query.shape[1] > key.shape[1]:
            return grouped(scaling, query, key, value), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0], None


_ITSELF = native.Paths.of([[0]])

AttentionInterface.register(GROUPED, _attend)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
