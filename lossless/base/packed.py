"""A base with packed weights: in place, or in a copy of its structure (a twin).

Knows: which modules are plain products, what packing takes and gives back, and how it is undone. Does not know: passes, drafts,
or when packed products pay.

    pack(model)     the model itself computes with packed weights, and has no others; and where heads share keys, a row attends
                    as base/attention.py has it. It is faster by itself, and a row has the same bits however many stand beside it. What `accelerate` then promises, it promises
                    against this model. Logits differ from those of the unpacked one by rounding.
    packed_twin     a second model of the same structure beside it. The base keeps its own weights and its own bits.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..models import free_memory, require_model
from . import products
from .attention import GROUPED
from .structure import structure_of

_TWIN_SHARE = 0.5  # of the memory that is free, a twin takes at most so much


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` (or a Conv1D, or 4-bit weights): the same product, from a packed weight.

    Args:
        weight: `[out, in]`, dense; it is not kept.
        bias: `[out]` or None.
        origin: the class that it stands in for.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, origin: type = nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.origin = origin
        self.packed, self.dtype = products.pack(weight), weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.least = products.least_rows(self.in_features, self.out_features, weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, dense: a copy, made at each call."""
        return products.unpack(self.packed)

    def original_weight(self) -> torch.Tensor:
        """The weight as the module had it that this one stands in for: a Conv1D's is `[in, out]`."""
        return self.weight.t().contiguous() if self.origin is Conv1D else self.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.least == 1 or rows.numel() > rows.shape[-1]:
            return products.multiply(rows, self.packed, self.bias)
        both = products.multiply(rows.reshape(1, -1).expand(self.least, -1), self.packed, self.bias)
        return both[:1].reshape(*rows.shape[:-1], -1)

    def alike(self) -> Self:
        """Another module with the same packed weight: hooks of the one are not hooks of the other."""
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        for name in ("in_features", "out_features", "packed", "dtype", "bias", "least", "origin"):
            setattr(other, name, getattr(self, name))
        return other.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.original_weight()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a packed weight cannot be written down, a dense one can."""
        return {**self.__dict__, "packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "packed": products.pack(state["packed"])})

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        probe = torch.empty(0, dtype=self.dtype)
        if (moved := fn(probe)).dtype != probe.dtype or moved.device != probe.device:
            raise UsageError("packed weights stay in their dtype and on the CPU: call lossless.unpack(model) before it is moved or converted")
        return super()._apply(fn, recurse)


class Int8Linear(nn.Module):
    """An `nn.Linear` whose weight was rounded to 8 bits: for drafts.

    Args:
        weight: `[out, in]`, dense; it is not kept.
        bias: `[out]` or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = products.pack_int8(weight), None if bias is None else bias.detach().float()

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, dense and rounded: a copy, made at each call."""
        return products.unpack_int8(self.packed)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows."""
        out = products.multiply_int8(rows.float(), self.packed)
        return (out if self.bias is None else out + self.bias).to(rows.dtype)


def draft_itemsize(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that `draft_linear` takes for each number of a weight."""
    return 1 if device.type == "cpu" and products.int8_packable() else dtype.itemsize


def draft_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The cheapest product with this weight that is to be had here, for drafts: they cost time if they are wrong, never a token."""
    if weight.device.type == "cpu" and products.int8_packable():
        return Int8Linear(weight, bias)
    if weight.device.type == "cpu" and products.packable(weight.dtype):
        return PackedLinear(weight, bias)
    plain: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def dense(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight `[out, in]` and bias of a module that is a product and nothing else; None for any other, or if they are not at hand."""
    dtype, weight = product_dtype(module), getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if dtype is None:
        return None
    if type(module) is Conv1D:
        return weight.t(), bias  # type: ignore[union-attr]
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype), bias  # type: ignore[union-attr]
    return weight, bias  # type: ignore[return-value]


def product_dtype(module: nn.Module) -> torch.dtype | None:
    """In what a module computes that is a product and nothing else, and whose weight can be had; None for any other."""
    if isinstance(module, PackedLinear):
        return module.dtype
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return None
    if type(module) is nn.Linear or type(module) is Conv1D:
        return weight.dtype
    state = getattr(weight, "quant_state", None)
    # once it has answered on some CPUs, bitsandbytes keeps 4-bit weights in the order of its own kernel
    if type(module).__name__ == "Linear4bit" and state is not None and not getattr(state, "packing_format_for_cpu", False):
        computed: Any = module.compute_dtype
        return computed or torch.float32
    return None


def packed_bytes(model: nn.Module) -> int:
    """What a twin's packed weights take."""
    found = 0
    for module, dtype in _products(model).values():
        numbers = module.weight.numel() if type(module) is Conv1D else module.in_features * module.out_features
        found += numbers * dtype.itemsize
    return found


def _products(model: nn.Module) -> dict[str, tuple[Any, torch.dtype]]:
    """The modules that can be packed here, by name, and in what they compute."""
    found: dict[str, tuple[Any, torch.dtype]] = {}
    module: Any
    for name, module in model.named_modules():
        dtype = None if isinstance(module, PackedLinear) else product_dtype(module)
        if dtype is not None and module.weight.device.type == "cpu" and products.packable(dtype):
            found[name] = (module, dtype)
    return found


def _replace(model: nn.Module, kinds: tuple[type, ...] | None = None) -> int:
    """Packed modules in the places of plain ones (of these kinds); returns how many."""
    names = [name for name, (module, _) in _products(model).items() if kinds is None or type(module) in kinds]
    for name in names:
        module = model.get_submodule(name)
        weight, bias = dense(module)  # type: ignore[misc]
        _put(model, name, PackedLinear(weight, bias, type(module)).train(module.training))
    return len(names)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def pack(model: Any) -> Any:
    """Pack the weights of a frozen model in place; returns it.

    Each weight is packed and let go in turn, so that no second copy of the model is ever held (tied embeddings stay as they
    are beside the packed head). Undone by `unpack`.

    Raises:
        UsageError: the model holds weights that ask for gradients, or nothing that can be packed here.
    """
    require_model(model)
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("pack() takes a frozen model: call model.requires_grad_(False) first")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        return model
    if not _replace(model, (nn.Linear, Conv1D)):
        dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
        raise UsageError(f"{type(model).__name__} in {dtype} on {getattr(model, 'device', 'its device')} has no weight that can be packed: "
                         "packing takes a CPU and a dtype that its oneDNN knows (float32; bfloat16 from AVX-512 on)")  # fmt: skip
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
    return model


def unpack(model: Any) -> Any:
    """Dense weights again, bit for bit those that were packed; returns the model."""
    require_model(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            sizes = (module.out_features, module.in_features) if module.origin is Conv1D else (module.in_features, module.out_features)
            with torch.device("meta"):
                plain = module.origin(*sizes)
            plain.weight = nn.Parameter(module.original_weight(), requires_grad=False)
            plain.bias = module.bias
            _put(model, name, plain.train(module.training))
    model.tie_weights()
    if model.config.get_text_config()._attn_implementation == GROUPED:
        model.set_attn_implementation("sdpa")
    return model


def warm_up(model: nn.Module, rows: int) -> None:
    """Have oneDNN prepare the packed products of a model for every number of rows up to this one: the first of each takes longer,
    once in a process, and would otherwise do so in the middle of an answer."""
    kinds = {(m.in_features, m.out_features, m.dtype): m for m in model.modules() if isinstance(m, PackedLinear)}
    for module in kinds.values():
        for count in range(1, rows + 1):
            module(torch.zeros(1, count, module.in_features, dtype=module.dtype))


def model_bytes(model: nn.Module) -> int:
    """What a model's weights take, packed ones included."""
    packed = sum(m.in_features * m.out_features * m.dtype.itemsize for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(parameter.nbytes for parameter in model.parameters())


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def packed_twin(model: Any) -> Any | None:
    """A model of the same structure that computes with packed copies of the weights; None if there is no memory for them, or
    nothing to pack."""
    needed = packed_bytes(model)
    if not needed or needed > _TWIN_SHARE * free_memory(torch.device("cpu")) * 2**30:
        return None
    twin = structure_of(model)
    _replace(twin)
    return twin
