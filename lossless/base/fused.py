"""Decoder layers in two calls of C (layer.c), where eager ones take some forty.

Knows: which layers are a norm, attention with rotary embedding, a norm and a gated MLP, each added to what came in, and how their parts
are handed to C. Does not know: passes, masks, or caches. Whether a layer that looks so computes so has to be tried.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .linears import FourBitLinear, Int8Linear, PackedLinear
from .norms import FusedNorm
from .panels import EIGHT_BITS, FOUR_BITS, EightBits, Panels

_LANES = 16  # of the widest vectors


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "ins", "outs")), ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("scales", "code", "bias")),
    ]  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_double)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Norm) for name in ("first", "second", "of_queries", "of_keys")),
        *((name, ctypes.c_int64) for name in ("dim", "heads", "kv_heads", "head_dim")), ("scale", ctypes.c_double),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """A decoder layer of float32 rows.

    Attributes:
        layer: what C is told of it; kept: the tensors that it points to.
        heads, kv_heads, head_dim, dim, inner: its sizes.
    """

    layer: _Layer
    kept: list[torch.Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    inner: int

    @classmethod
    def of(cls, module: Any) -> FusedLayer | None:
        """A decoder layer, all of whose projections and norms have stand-ins; None if it looks otherwise."""
        attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
        named = {name for name, _ in module.named_children()}
        if attention is None or mlp is None or named != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return None
        projections: list[Any] = [getattr(attention, f"{name}_proj", None) for name in "qkvo"] + [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
        norms = [module.input_layernorm, module.post_attention_layernorm, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]
        own = {id(part) for part in (*projections, *norms)}
        others = [part for part in (*attention.children(), *mlp.children()) if id(part) not in own]
        act, size, scaling = getattr(mlp, "act_fn", None), getattr(attention, "head_dim", 0), getattr(attention, "scaling", None)
        if not all(map(_is_weight, projections)) or not all(norm is None or isinstance(norm, FusedNorm) for norm in norms):
            return None
        if [part for part in others if part is not act] or type(act).__name__ not in ("SiLU", "SiLUActivation") or not isinstance(scaling, float):
            return None
        if size % (2 * _LANES) or mlp.gate_proj.out_features % _LANES or list(attention.parameters(recurse=False)) or not _sees_everything(attention):
            return None
        kept: list[torch.Tensor] = []
        weights, scales = [_weight(part, kept) for part in projections], [_norm(norm, kept) for norm in norms]
        dim, heads, kv_heads = (n for n in (projections[0].in_features, *(part.out_features // size for part in projections[:2])))
        return cls(_Layer(*weights, *scales, dim, heads, kv_heads, size, scaling), kept, heads, kv_heads, size, dim, mlp.gate_proj.out_features)

    def before(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[1, rows, dim]`, `[1, rows, head_dim]` twice -> queries `[rows, heads, head_dim]`, keys and values
        `[1, kv_heads, rows, head_dim]`."""
        rows = hidden.shape[1]
        query, key, value = (torch.empty(rows, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads))
        scratch = torch.empty(rows, self.dim)
        kernels.library().lossless_before(
            ctypes.byref(self.layer), hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(),
            scratch.data_ptr(), rows, torch.get_num_threads(),
        )  # fmt: skip
        return query, key.transpose(0, 1)[None], value.transpose(0, 1)[None]

    def behind(self, hidden: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: kernels.Paths) -> torch.Tensor:
        """`[1, rows, dim]`, what `before` gave, and keys and values of the past and of these rows, `[1, kv_heads, past + rows, head_dim]`
        -> `[1, rows, dim]`."""
        rows, threads, depth = hidden.shape[1], torch.get_num_threads(), paths.rows.shape[1]
        past, out = key.shape[2] - rows, torch.empty_like(hidden)
        mixed = self.heads * self.head_dim
        attending = self.heads * rows * (past + depth + self.head_dim) + threads * kernels.panel() * self.head_dim
        scratch = torch.empty(rows * (2 * mixed + 3 * self.dim + 2 * self.inner) + attending)
        strides = (ctypes.c_ssize_t * 4)(key.stride(1), key.stride(2), value.stride(1), value.stride(2))
        kernels.library().lossless_behind(
            ctypes.byref(self.layer), hidden.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(), strides,
            paths.lengths.data_ptr(), paths.rows.data_ptr(), depth, past, out.data_ptr(), scratch.data_ptr(), rows, threads,
        )  # fmt: skip
        return out


def _sees_everything(attention: Any) -> bool:
    """Whether a row attends to all that is before it, however long the text."""
    config, number = getattr(attention, "config", None), getattr(attention, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if number is None or (kinds and kinds[number] != "full_attention"):
        return False
    if kinds or hasattr(attention, "sliding_window"):
        return getattr(attention, "sliding_window", None) is None
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


def _is_weight(part: Any) -> bool:
    return isinstance(part, FourBitLinear) or (isinstance(part, PackedLinear | Int8Linear) and isinstance(part.packed, Panels | EightBits))


def _weight(part: Any, kept: list[torch.Tensor]) -> _Weight:
    if isinstance(part, FourBitLinear):
        kind, tensors = FOUR_BITS, [part.four_bits.numbers, part.four_bits.scales, part.four_bits.code]
    elif isinstance(part.packed, EightBits):
        kind, tensors = EIGHT_BITS, [part.packed.numbers, part.packed.scales]
    else:
        kind, tensors = part.packed.kind, [part.packed.numbers]
    bias = None if part.bias is None else part.bias.detach().float().contiguous()
    kept += [*tensors, *([] if bias is None else [bias])]
    pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (3 - len(tensors))
    return _Weight(kind, part.in_features, part.out_features, *pointers, None if bias is None else bias.data_ptr())


def _norm(norm: FusedNorm | None, kept: list[torch.Tensor]) -> _Norm:
    if norm is None:
        return _Norm(None, math.nan)
    weight = (norm.weight.detach().float() + norm.offset).contiguous()
    kept.append(weight)
    return _Norm(weight.data_ptr(), norm.eps)
