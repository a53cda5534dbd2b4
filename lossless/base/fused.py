"""Decoder layers in two calls of C (layer.c), where eager ones take some forty, and several of them in one.

Knows: which layers are a norm, attention with rotary embedding, a norm and a gated MLP, each added to what came in, how their parts are
handed to C, and how a packed model's own layers go this way for single tokens. Does not know: passes over trees (streams/fusing.py).
Whether a layer that looks so computes so has to be tried.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from ..kernels import native, panels
from .layers import CACHE
from .norms import ExactNorm, FusedNorm, Norm
from .projections import Weight, multipliable
from .structure import comes_from, global_hooks, listeners

_SILU = ("SiLU", "SiLUActivation")
# weights that an exact twin may have
_EXACT = {torch.bfloat16: (native.BFLOAT16, native.PAIRED_FOUR_BITS, native.INTERLEAVED), torch.float16: (native.INTERLEAVED_FLOAT16,)}


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Norm) for name in ("first", "second", "of_queries", "of_keys")),
        *((name, ctypes.c_int64) for name in ("kind", "dim", "heads", "kv_heads", "head_dim")), ("scale", ctypes.c_double),
        ("activation", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """A decoder layer.

    Attributes:
        layer: what C is told of it; kept: the tensors that it points to.
        exactly: it has the bits of torch's eager operations, for layers in 16 bits of an exact twin (base/exact.py).
        dtype: of hidden states, keys and values.
        heads, kv_heads, head_dim, dim, inner: its sizes.
    """

    layer: _Layer
    kept: list[torch.Tensor]
    exactly: bool
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    inner: int

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype | None = None) -> FusedLayer | None:
        """A decoder layer, all of whose projections and norms have stand-ins; None if it looks otherwise.

        dtype: of hidden states, None for that of the norms' weights.
        """
        if (parts := _parts(module)) is None:
            return None
        projections, norms = parts
        attention, inner = module.self_attn, projections[-1].in_features
        size, dim = attention.head_dim, projections[0].in_features
        if size % (2 * native.LANES) or inner % native.LANES or not sees_everything(attention):
            return None
        kept: list[torch.Tensor] = []
        weights, scales = [Weight.of(part, kept) for part in projections], [Norm.of(norm, kept) for norm in norms]
        exactly, activation = isinstance(norms[0], ExactNorm), None
        if exactly:
            kind: Any = type(module.mlp.act_fn)
            dtype = norms[0].weight.dtype
            activation = _table(kind, dtype, inner) if all(weight.kind in _EXACT[dtype] for weight in weights) else None
            if activation is None:
                return None
            kept.append(activation)
        heads, kv_heads = (part.out_features // size for part in projections[:2])
        dtype = dtype or norms[0].weight.dtype
        told = _Layer(
            *weights, *scales, native.KINDS[dtype], dim, heads, kv_heads, size, attention.scaling, None if activation is None else activation.data_ptr()
        )
        return cls(told, kept, exactly, dtype, heads, kv_heads, size, dim, inner)

    def __deepcopy__(self, memo: Any) -> FusedLayer:
        """Itself: it does not change."""
        return self

    def before(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[1, rows, dim]`, `[1, rows, head_dim]` twice -> queries `[rows, heads, head_dim]`, keys and values
        `[1, kv_heads, rows, head_dim]`."""
        rows = hidden.shape[1]
        query = native.room(rows, self.heads, self.head_dim)
        key, value = (native.room(rows, self.kv_heads, self.head_dim, dtype=self.dtype) for _ in range(2))
        scratch = native.room(self.scratch(rows, 0, torch.get_num_threads()))
        native.compiled().lossless_before(
            ctypes.byref(self.layer), hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(),
            scratch.data_ptr(), self.longest, rows, torch.get_num_threads(),
        )  # fmt: skip
        return query, key.transpose(0, 1)[None], value.transpose(0, 1)[None]

    def behind(self, hidden: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: native.Paths) -> torch.Tensor:
        """`[1, rows, dim]`, what `before` gave, and keys and values of the past and of these rows, `[1, kv_heads, past + rows, head_dim]`
        -> `[1, rows, dim]`."""
        rows, threads, depth = hidden.shape[1], torch.get_num_threads(), paths.rows.shape[1]
        past, out = key.shape[2] - rows, torch.empty_like(hidden)
        scratch = native.room(self.scratch(rows, past + depth, threads))
        strides = (ctypes.c_ssize_t * 4)(key.stride(1), key.stride(2), value.stride(1), value.stride(2))
        native.compiled().lossless_behind(
            ctypes.byref(self.layer), hidden.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(), strides,
            paths.lengths.data_ptr(), paths.rows.data_ptr(), depth, past, out.data_ptr(), scratch.data_ptr(), self.longest, rows, threads,
        )  # fmt: skip
        return out

    @property
    def sizes(self) -> tuple[Any, ...]:
        return self.exactly, self.dtype, self.dim, self.heads, self.kv_heads, self.head_dim, self.inner

    @property
    def longest(self) -> int:
        """The widest rows that a projection is given."""
        return max(self.heads * self.head_dim, self.dim, self.inner)

    def scratch(self, rows: int, keys: int, threads: int) -> int:
        """Numbers that either call needs, or that of several layers, if a row sees so many keys at most."""
        if self.exactly:  # rows of 16 bits, five as long as can be, keys and values, and one more in 32, with what fills it up
            return rows * (4 * self.longest + panels.ABREAST + self.kv_heads * self.head_dim) + native.scratch_exactly(self.head_dim, keys, threads)
        attending = self.heads * rows * (keys + self.head_dim) + threads * native.panel() * self.head_dim
        own = 3 * self.dim + (2 + 3 * self.heads + 2 * self.kv_heads) * self.head_dim + 2 * self.inner + self.longest
        return rows * own + attending


class _Kept(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("capacity", ctypes.c_int64)]


class Stores:
    """Keys and values of several layers, as C is told of them.

    kept: of each `[1, kv_heads, capacity, head_dim]`, contiguous.
    """

    def __init__(self, kept: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.kept = kept
        self.told = (_Kept * len(kept))(*(_Kept(key.data_ptr(), value.data_ptr(), key.shape[2]) for key, value in kept))


class FusedLayers:
    """Decoder layers of the same sizes, each of which is given what the one before it gave."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self.layers, self.like = list(layers), layers[0]
        self._told = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(layer.layer) for layer in layers))

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, stores: Stores, past: int, paths: native.Paths
    ) -> torch.Tensor | None:
        """`[1, rows, dim]`, `[1, rows, head_dim]` twice -> `[1, rows, dim]`; None if they are exact, and their attention found what is no finite number.

        stores: of each layer; keys and values of these rows are written behind `past` others.
        """
        like, rows, depth, threads = self.like, hidden.shape[1], paths.rows.shape[1], torch.get_num_threads()
        out, scratch = torch.empty_like(hidden), native.room(like.scratch(rows, past + depth, threads))
        by = native.in_torchs_order("layers", like.dtype) if like.exactly else native.compiled().lossless_layers
        odd = by(
            self._told, stores.told, len(stores.kept), hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(), paths.lengths.data_ptr(),
            paths.rows.data_ptr(), depth, past, out.data_ptr(), scratch.data_ptr(), like.longest, rows, threads,
        )  # fmt: skip
        return None if odd else out


class PlainForward:
    """The forward of a packed model's layer: single tokens behind a cache go the short way, everything else through the layer itself.

    Args:
        layer: the layer; eager: its own forward.
        fused: the short way, None if there is none any more (a copy that was pickled).
    """

    def __init__(self, layer: Any, fused: FusedLayer | None) -> None:
        self.layer, self.fused = layer, fused
        self.__signature__ = inspect.signature(self.eager)
        self._parts: list[tuple[nn.Module, str, nn.Module]] = []  # of the layer, once it is whole

    @property
    def eager(self) -> Any:
        """The layer's forward as its class has it."""
        return type(self.layer).forward.__get__(self.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainForward:
        return PlainForward(copy.deepcopy(self.layer, memo), self.fused)

    def __reduce__(self) -> Any:
        return PlainForward, (self.layer, None)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, turned, fused = kwargs.get(CACHE), kwargs.get("position_embeddings"), self.fused
        if args or fused is None or turned is None or not isinstance(cache, DynamicCache) or not self._serves(hidden_states, turned[0], kwargs):
            return self.eager(hidden_states, *args, **kwargs)
        hidden: torch.Tensor = hidden_states.contiguous()
        query, key, value = fused.before(hidden, *(each.contiguous() for each in turned))
        keys, values = cache.update(key, value, self.layer.self_attn.layer_idx)
        return fused.behind(hidden, query, keys, values, _ITSELF)

    def _serves(self, hidden: torch.Tensor, cos: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether it is a single token that sees all that is before it, in the layer as it was."""
        fused, mask = self.fused, kwargs.get("attention_mask")
        fits = fused is not None and hidden.shape[:2] == (1, 1) and cos.shape == (1, 1, fused.head_dim) and hidden.dtype is cos.dtype is fused.dtype
        seen = mask is None or (mask.dtype is torch.bool and bool(mask.all()))
        learning = hidden.requires_grad and torch.is_grad_enabled()
        return fits and seen and not learning and not kwargs.get("output_attentions") and self._untouched()

    def _untouched(self) -> bool:
        """Whether the layer has the parts that it had, and nobody listens to them."""
        self._parts = self._parts or [(parent, name, part) for parent in self.layer.modules() for name, part in parent.named_children()]
        return not global_hooks() and all(
            parent._modules[name] is part and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
            for parent, name, part in self._parts
        )


_ITSELF = native.Paths.of([[0]])


def fuse_plain(layers: nn.ModuleList, dtype: torch.dtype | None = None) -> bool:
    """Let the layers of a packed model go the short way for single tokens; False, and nothing is done, unless all of them look as if
    they could. Undone by `unfuse_plain`. `dtype`: of hidden states, None for the model's own."""
    found = [None if "forward" in layer.__dict__ else FusedLayer.of(layer, dtype) for layer in layers]
    if not all(found):
        return False
    layer: Any
    for layer, fused in zip(layers, found, strict=True):
        layer.forward = PlainForward(layer, fused)
    return True


def unfuse_plain(layers: nn.ModuleList) -> bool:
    """The layers as they were; whether they went the short way."""
    found = [layer for layer in layers if isinstance(layer.__dict__.get("forward"), PlainForward)]
    for layer in found:
        del layer.forward
    return len(found) == len(layers)


def usual_parts(module: Any) -> tuple[list[Any], list[Any]] | None:
    """Of a decoder layer the projections (q, k, v, o, gate, up, down) and the norms (first, second, of queries, of keys, the last two None if there
    are none); None if it has other parts, or is not transformers' own."""
    if {name for name, _ in module.named_children()} != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    attention, mlp = module.self_attn, module.mlp
    projections = [getattr(attention, f"{name}_proj", None) for name in "qkvo"] + [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
    norms = [module.input_layernorm, module.post_attention_layernorm, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]
    act, known = getattr(mlp, "act_fn", None), [*projections, *norms]
    others = [part for part in (*attention.children(), *mlp.children()) if not any(part is each for each in known)]
    if None in projections or any(part is not act for part in others) or list(attention.parameters(recurse=False)):
        return None
    whole = all(map(_is_theirs, (module, attention, mlp))) and isinstance(getattr(attention, "scaling", None), float) and hasattr(attention, "head_dim")
    return (projections, norms) if whole else None


def _parts(module: Any) -> tuple[list[Any], list[Any]] | None:
    """The same, if C has all of them, and nothing listens to one."""
    if (found := usual_parts(module)) is None:
        return None
    projections, norms = found
    if not multipliable(projections) or {type(norm) for norm in norms if norm is not None} not in ({FusedNorm}, {ExactNorm}):
        return None
    if type(act := getattr(module.mlp, "act_fn", None)).__name__ not in _SILU or global_hooks():
        return None
    return None if any(map(listeners, (module.self_attn, module.mlp, act, *filter(None, norms)))) else found


def _is_theirs(part: Any) -> bool:
    """Whether a part computes what transformers has it compute: neither its class nor itself was given another forward."""
    own = vars(part).get("forward")
    return comes_from(type(part).forward).startswith(("transformers.", "torch.")) and (own is None or isinstance(own, PlainForward))


def sees_everything(attention: Any) -> bool:
    """Whether a row attends to all that is before it, however long the text."""
    config, number = getattr(attention, "config", None), getattr(attention, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"):  # far behind, scores are scaled by where a row stands
        return False
    if number is None or (kinds and kinds[number] != "full_attention"):
        return False
    if kinds or hasattr(attention, "sliding_window"):
        return getattr(attention, "sliding_window", None) is None
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


@functools.cache
@torch.no_grad()
def _table(kind: Callable[[], nn.Module], dtype: torch.dtype, inner: int) -> torch.Tensor | None:
    """`[65536]`, what a gate's activation makes of each number of 16 bits; None if that hangs on where a number stands in a row of `inner`."""
    act, every = kind(), torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every.masked_fill(every.isnan(), math.nan)
    found = act(every)
    for shift in (0, 1):
        rows = F.pad(every[shift:], (0, -(2**16 - shift) % inner)).view(-1, 1, 1, inner)
        again = torch.cat([act(row).flatten() for row in rows])[: 2**16 - shift]
        if not torch.equal(again.view(torch.int16), found[shift:].view(torch.int16)):
            return None
    return found
