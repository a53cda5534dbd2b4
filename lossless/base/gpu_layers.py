"""Decoder layers of a model that was packed for a GPU, in some fourteen kernels where eager ones take twenty-four.

Knows: which layers are a norm, attention with rotary embedding, a norm and a gated MLP, each added to what came in, and how such a layer is
computed with the very roundings of transformers' own operations. Does not know: passes, or what is captured (streams/graphs.py). Whether a layer
that looks so computes so has to be tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels import gpu
from ..kernels.gpu import Told
from .fused import sees_everything, usual_parts
from .norms import FusedNorm


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """A decoder layer, by its parts.

    Attributes:
        projections: q, k, v, o, gate, up, down; norms: first, second, and of queries and of keys, where there are such.
    """

    projections: list[Any]
    norms: list[Any]
    attention: Any
    activation: Any

    @classmethod
    def of(cls, module: Any) -> GpuLayer | None:
        """None if it looks otherwise."""
        parts, activation = usual_parts(module), getattr(getattr(module, "mlp", None), "act_fn", None)
        if parts is None or activation is None or not sees_everything(module.self_attn) or not isinstance(parts[1][1], FusedNorm):
            return None
        return cls(*parts, module.self_attn, activation)

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, told: Told) -> torch.Tensor:
        """`[1, rows, dim]`, `[1, rows, head_dim]` twice -> `[1, rows, dim]`; keys and values are kept as `told` has it."""
        (q, k, v, o, gate, up, down), (first, second, *of_heads) = self.projections, self.norms
        rows, size = first(hidden), self.attention.head_dim
        query, key, value = (part(rows).view(-1, part.out_features // size, size) for part in (q, k, v))
        query, key = (each if norm is None else norm(each) for each, norm in zip((query, key), of_heads, strict=True))
        query, key = gpu.turn(query, key, cos[0], sin[0])
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
        attended = gpu.attend(query, key, value, self.attention.scaling, told, self.attention.layer_idx)
        hidden, rows = second.behind(hidden, o(attended.flatten(2)))
        return hidden + down(self.activation(gate(rows)) * up(rows))


def gpu_layers(layers: nn.ModuleList) -> list[GpuLayer] | None:
    """All of them; None unless all look so."""
    found = [GpuLayer.of(layer) for layer in layers]
    return [each for each in found if each is not None] if all(found) else None
