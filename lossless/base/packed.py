"""A base with packed weights: in place, or in a copy of its structure (a twin).

Knows: which modules are plain products, what packing takes and gives back, and how it is undone. Does not know: passes, drafts,
or when packed products pay.

    pack(model)     the model itself computes with packed weights, and has no others, and its rows attend as base/attention.py has
                    it. It is faster by itself, and a row has the same bits however many stand beside it. What `accelerate` then
                    promises, it promises against this model. Logits differ from those of the unpacked one by rounding.
    packed_twin     a second model of the same structure beside it. The base keeps its own weights and its own bits.

What stands in for a module has its weight in panels, for a kernel of ours, or where there is none in oneDNN's layout
(base/linears.py); 4-bit weights have a kernel, or are decoded for a twin. On a GPU weights stay as they are, and products take a fixed number of
rows.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..kernels import gpu, grids, native, panels, products
from ..kernels.pages import together
from .attention import GROUPED
from .fused import fuse_plain, unfuse_plain
from .layers import CACHE, decoder_layers, device_of, features
from .linears import FourBitLinear, PackedLinear, PaddedLinear, StoredLinear, packable, scales_of, stored_pairs
from .loading import require_model
from .norms import FusedNorm, fused
from .processes import free_memory
from .structure import structure_of

TWIN_SHARE = 0.5  # of the memory that is free, a twin takes at most so much
_SAME = 1e-3  # of the spread of logits: further off, a layer computes something else
_STANDING_IN = (PackedLinear, StoredLinear, PaddedLinear, FourBitLinear, FusedNorm)


def dense(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight `[out, in]` and bias of a module that is a product and nothing else; None for any other, or if they are not at hand."""
    dtype, weight = product_dtype(module), getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if dtype is None:
        return None
    if type(module) is Conv1D:
        return weight.t(), bias  # type: ignore[union-attr]
    if _is_four_bit(module):
        return (_decoded(module) if weight.device.type == "cpu" else _decoded_there(module)).to(dtype), bias  # type: ignore[union-attr]
    return weight, bias  # type: ignore[return-value]


def _decoded(module: Any) -> torch.Tensor:
    """The weight of a `Linear4bit` on a CPU, in whatever order bitsandbytes keeps it: `[out, in]`."""
    pairs, state = stored_pairs(module)
    return panels.FourBits.from_pairs(pairs, scales_of(state), state.code, state.shape[0]).dense()


def _decoded_there(module: Any) -> torch.Tensor:
    """The same anywhere else, where bitsandbytes keeps it as it was quantized."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def product_dtype(module: nn.Module) -> torch.dtype | None:
    """In what a module computes that is a product and nothing else, and whose weight can be had; None for any other."""
    if isinstance(module, PackedLinear | FourBitLinear):
        return module.dtype
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return None
    if type(module) in (nn.Linear, StoredLinear, PaddedLinear, Conv1D):
        return weight.dtype
    if _is_four_bit(module):
        computed: Any = module.compute_dtype
        return computed or torch.float32
    return None


def _is_four_bit(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' product with 4-bit weights, quantized already, in blocks that are whole parts of a row."""
    state = getattr(module.weight, "quant_state", None) if type(module).__name__ == "Linear4bit" else None
    return state is not None and state.blocksize == 64 and state.shape[1] % 64 == 0


def stand_in(module: Any) -> type | None:
    """What may stand in for a module here, or None: it stays as it is."""
    heard = module._forward_hooks or module._forward_pre_hooks  # somebody's own: they would be lost
    dtype = None if heard or isinstance(module, _STANDING_IN) else product_dtype(module)
    if dtype is None:
        return None
    if on_gpu(module):
        return PaddedLinear if type(module) is nn.Linear and dtype in gpu.DTYPES else None
    if module.weight.device.type != "cpu":
        return None
    ins = features(module)[0]
    if _is_four_bit(module) and panels.four_bits_available(ins):
        return FourBitLinear
    return PackedLinear if packable(dtype, ins) else None


def on_gpu(module: Any) -> bool:
    """Whether its weight is where kernels for a GPU run, and they are to be had."""
    return gpu.here(module.weight) and gpu.available()


def _storable(module: Any) -> bool:
    """Whether a kernel of ours takes its weight as it is stored."""
    return type(module) is nn.Linear and module.weight.device.type == "cpu" and native.multipliable(module.out_features, module.in_features, module.weight.dtype)


def _replace(model: nn.Module, kinds: dict[str, type]) -> None:
    """Others in the places of these modules, and of norms."""
    with together():
        for name, kind in kinds.items():
            module: Any = model.get_submodule(name)
            if kind is FourBitLinear:
                made: nn.Module = FourBitLinear(module)
            elif kind in (StoredLinear, PaddedLinear):
                made = kind.over(module.weight, module.bias)
            else:
                weight, bias = dense(module)  # type: ignore[misc]
                made = PackedLinear(weight, bias, type(module))
            put(model, name, made.train(module.training))
    for name, module in list(model.named_modules()):
        if (norm := fused(module)) is not None:
            put(model, name, norm.train(module.training))


def _stand_ins(model: nn.Module) -> dict[str, type]:
    """What may stand in for each module, by name."""
    found = ((name, stand_in(module)) for name, module in model.named_modules())
    return {name: kind for name, kind in found if kind is not None}


def packed_bytes(model: nn.Module, kinds: dict[str, type] | None = None) -> int:
    """What the weights of a twin take (with these modules)."""
    found = 0
    for name, kind in (_stand_ins(model) if kinds is None else kinds).items():
        module: Any = model.get_submodule(name)
        ins, outs = features(module)
        if kind is PackedLinear:
            found += int(ins * outs * _packed_itemsize(module))
        elif kind is FourBitLinear:
            found += ins * outs // 2
    return found


def _packed_itemsize(module: Any) -> float:
    """Bytes that each number of a module's weight takes when it is packed."""
    dtype: Any = product_dtype(module)
    if _is_four_bit(module) or not panels.available(dtype, features(module)[0]):
        return float(dtype.itemsize)
    weight = module.weight if type(module) is not Conv1D else module.weight.t()
    return grids.itemsize(weight) or panels.itemsize(weight)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Another module in the place of the one of this name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def pack(model: Any) -> Any:
    """Pack the weights of a frozen model in place; returns it.

    Each weight is packed and let go in turn, so that no second copy of the model is ever held (tied embeddings stay as they
    are beside the packed head). Undone by `unpack`.

    Raises:
        UsageError: the model holds weights that ask for gradients, or nothing that can be packed here, or there is no memory to do it in.
    """
    require_model(model)
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("pack() takes a frozen model: call model.requires_grad_(False) first")
    if is_packed(model):
        return model
    kinds = {name: kind for name, kind in _stand_ins(model).items() if kind is not PackedLinear or not _is_four_bit(model.get_submodule(name))}
    if not kinds:
        dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
        raise UsageError(f"{type(model).__name__} in {dtype} on {getattr(model, 'device', 'its device')} has no weight that can be packed: "
                         "packing takes a CPU, and float32, bfloat16 (from AVX-512 on, or with gcc), float16 (with gcc) or 4 bits (with gcc); or the current GPU, with Triton, and float32, bfloat16 or float16")  # fmt: skip
    largest: Any = max((model.get_submodule(name).weight for name in kinds), key=lambda weight: weight.nbytes)  # packed, none takes more
    needed, free = largest.nbytes / 2**20, free_memory(device_of(model)) * 2**10
    if needed > free:
        raise UsageError(f"pack() lays out a weight anew before it lets the old one go: that takes up to {needed:.0f} MiB, and {free:.0f} MiB are free")
    _replace(model, kinds)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
    if not is_padded(model):
        _fuse(model)
    return model


@torch.no_grad()
def _fuse(model: Any) -> None:
    """Let the decoder layers of a packed model go the short way, if they look as if they could, and then compute the same."""
    try:
        layers = decoder_layers(model)
    except UsageError:  # not a model that is accelerated
        return
    if not fuse_plain(layers, torch.float32):
        return
    # in float32, where a difference is no rounding; the first round goes the short way, the second the layers' own
    ids, found = torch.tensor([[1 + 3 * i % (model.config.get_text_config().vocab_size - 1) for i in range(6)]]), []
    rows = model.get_input_embeddings()(ids).float()
    with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError):  # a model that takes no float32 keeps its layers
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            model(inputs_embeds=rows[:, :5], **{CACHE: cache}, use_cache=True)
            found.append(model(inputs_embeds=rows[:, 5:], **{CACHE: cache}, use_cache=True).logits.float())
            unfuse_plain(layers)
    unfuse_plain(layers)
    if len(found) == 2 and (found[1] - found[0]).abs().max() < _SAME * found[1].std():
        fuse_plain(layers)


def unpack(model: Any) -> Any:
    """The modules that were there before, with the very numbers that were packed; returns the model."""
    require_model(model)
    with contextlib.suppress(UsageError):
        unfuse_plain(decoder_layers(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, _STANDING_IN):
            put(model, name, module.original().train(module.training))
    model.tie_weights()
    if model.config.get_text_config()._attn_implementation == GROUPED:
        model.set_attn_implementation("sdpa")
    return model


def warm_up(model: nn.Module, rows: int) -> None:
    """Have oneDNN prepare its products of a model for every number of rows up to this one: the first of each takes longer, once in a
    process, and would otherwise do so in the middle of an answer."""
    theirs = (m for m in model.modules() if isinstance(m, PackedLinear) and isinstance(m.packed, products.Packed))
    kinds = {(m.in_features, m.out_features, m.dtype): m for m in theirs}
    for module in kinds.values():
        for count in range(1, rows + 1):
            module(torch.zeros(1, count, module.in_features, dtype=module.dtype))


def copied_bytes(model: nn.Module) -> int:
    """What the packed copies of weights in a model take."""
    return sum(m.weight_bytes for m in model.modules() if isinstance(m, PackedLinear | FourBitLinear))


def model_bytes(model: nn.Module) -> int:
    """What a model's weights take, packed ones included."""
    return copied_bytes(model) + sum(parameter.nbytes for parameter in model.parameters())


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, _STANDING_IN) for module in model.modules())


def is_padded(model: nn.Module) -> bool:
    """Whether it was packed for a GPU."""
    return any(isinstance(module, PaddedLinear) for module in model.modules())


def has_memory_for(twin: int) -> bool:
    """Whether so many bytes of a twin may be taken; if not, that is told."""
    needed, free = twin / 2**20, free_memory(torch.device("cpu")) * 2**10
    if needed <= TWIN_SHARE * free:
        return True
    warnings.warn(
        f"packed copies of the weights take {needed:.0f} MiB, and of {free:.0f} MiB that are free they may take {TWIN_SHARE:.0%}: drafts are "
        "checked with the weights as they are, which is slower", stacklevel=2,
    )  # fmt: skip
    return False


def packed_twin(model: Any) -> Any | None:
    """A model of the same structure whose products cost little for further rows; None if there is none to be had.

    Where there is no memory for packed copies, kernels of ours take the weights as they are.
    """
    kinds = _stand_ins(model)
    if not has_memory_for(packed_bytes(model, kinds)):
        kinds = {name: kind for name, kind in kinds.items() if kind is not PackedLinear}
        kinds |= {name: StoredLinear for name, module in model.named_modules() if _storable(module)}
    if not kinds:
        return None
    twin = structure_of(model)
    _replace(twin, kinds)
    return twin
