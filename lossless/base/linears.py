"""Modules that multiply rows with a weight, and can do it in better ways than the base's own.

Knows: how each keeps its weight, multiplies with it, is copied and saved, and what it was before. Does not know: models, or which
of their modules are to be replaced (base/packed.py).

    PackedLinear    a copy of the weight in another layout: in panels, on a grid, or in oneDNN's
    StoredLinear    the weight as it is stored, multiplied by a kernel of ours
    PaddedLinear    the weight as it is stored, multiplied with rows of one number: on a GPU
    FourBitLinear   bitsandbytes' 4-bit numbers, in panels
    Int8Linear      rounded to 8 bits, for drafts
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..kernels import grids, native, panels, products

PADDED, PADDED_MOST = 16, 64  # rows of a product of `PaddedLinear`, and of a pass from which on it multiplies as torch does


def check_width(rows: torch.Tensor, width: int) -> None:
    """Raises RuntimeError, as torch does, if rows are not so many numbers wide: C would read past them, or past a weight."""
    if rows.shape[-1] != width:
        raise RuntimeError(f"rows must be {width} numbers wide, got {list(rows.shape)}")


def packable(dtype: torch.dtype, ins: int) -> bool:
    """Whether a weight of this dtype, for so many inputs, can be packed here."""
    return panels.available(dtype, ins) or products.packable(dtype)


Layout = Callable[[torch.Tensor], panels.Panels | panels.Interleaved | grids.Grid | products.Packed]  # of a weight `[out, in]`


def _packed(weight: torch.Tensor) -> panels.Panels | grids.Grid | products.Packed:
    """A weight `[out, in]` in the layout whose products are the fastest here."""
    if (grid := grids.Grid.of(weight)) is not None:
        return grid
    if panels.available(weight.dtype, weight.shape[1]):
        return panels.Panels.of(weight, panels.tile())
    return products.Packed.of(weight)


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` (or a Conv1D, or 4-bit weights): the same product, from a packed weight.

    Args:
        weight: `[out, in]`, dense; it is not kept.
        bias: `[out]` or None.
        origin: the class that it stands in for.
        layout: packs the weight; None: in the way that is the fastest here.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, origin: type = nn.Linear, layout: Layout | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.origin, self.layout = origin, layout or _packed
        self.packed, self.dtype = self.layout(weight), weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight_bytes(self) -> int:
        return self.packed.nbytes

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, dense: a copy, made at each call."""
        return self.packed.dense()

    def original_weight(self) -> torch.Tensor:
        """The weight as the module had it that this one stands in for: a Conv1D's is `[in, out]`."""
        return self.weight.t().contiguous() if self.origin is Conv1D else self.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        check_width(rows, self.in_features)
        if rows.requires_grad and torch.is_grad_enabled():  # packed products let no gradient through
            return F.linear(rows, self.weight, self.bias)
        return self.packed.multiply(rows, self.bias)

    def original(self) -> nn.Module:
        """A module of the class that it stands in for, with the weight and the bias that it had."""
        sizes = (self.out_features, self.in_features) if self.origin is Conv1D else (self.in_features, self.out_features)
        with torch.device("meta"):
            plain = self.origin(*sizes)
        plain.weight = nn.Parameter(self.original_weight(), requires_grad=False)
        plain.bias = self.bias
        return plain

    def alike(self) -> Self:
        """Another module with the same packed weight: hooks of the one are not hooks of the other."""
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        for name in ("in_features", "out_features", "packed", "dtype", "bias", "origin", "layout"):
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
        super().__setstate__({**state, "packed": state["layout"](state["packed"])})

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        _stays(fn, self.dtype, convertible=False)
        return super()._apply(fn, recurse)


def _stays(fn: Any, dtype: torch.dtype, convertible: bool) -> None:
    """Raises UsageError if `fn`, which is applied to a module's tensors, would move packed weights, or convert those that cannot be."""
    probe = torch.empty(0, dtype=dtype)
    if (moved := fn(probe)).device != probe.device or (moved.dtype != dtype and not convertible):
        raise UsageError("packed weights stay in their dtype and on the CPU: call lossless.unpack(model) before it is moved or converted")


class StoredLinear(nn.Linear):
    """An `nn.Linear` over the same parameters whose rows have the same bits beside any number of others."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        check_width(rows, self.in_features)
        if rows.device.type == "cpu" and native.multipliable(self.out_features, self.in_features, self.weight.dtype):
            return native.linear(rows, self.weight, self.bias)
        return super().forward(rows)  # the model was moved or converted since

    @classmethod
    def over(cls, weight: Any, bias: Any) -> Self:
        """Of these parameters."""
        return _linear_of(cls, weight, bias)

    def original(self) -> nn.Linear:
        """A plain one, of the same parameters."""
        return _linear_of(nn.Linear, self.weight, self.bias)


class PaddedLinear(nn.Linear):
    """An `nn.Linear` over the same parameters that multiplies a few rows always as so many: on a GPU, where a product takes another kernel, and
    adds up in another order, for other numbers of rows, and where the time is that of reading the weight. A row has the same bits beside any
    number of others, up to as many as are read of trees."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        count = rows.numel() // self.in_features
        if not 0 < count <= PADDED_MOST or (rows.requires_grad and torch.is_grad_enabled()):
            return super().forward(rows)
        pieces = rows.reshape(count, self.in_features).split(PADDED)
        done = [super(PaddedLinear, self).forward(_padded(piece))[: len(piece)] for piece in pieces]
        return (done[0] if len(done) == 1 else torch.cat(done)).view(*rows.shape[:-1], self.out_features)

    @classmethod
    def over(cls, weight: Any, bias: Any) -> Self:
        """Of these parameters."""
        return _linear_of(cls, weight, bias)

    def original(self) -> nn.Linear:
        """A plain one, of the same parameters."""
        return _linear_of(nn.Linear, self.weight, self.bias)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """`[PADDED, in]`: these rows, and behind them whatever was there, for the rows of a product do not meet."""
    if len(rows) == PADDED:
        return rows
    whole = rows.new_empty(PADDED, rows.shape[1])
    whole[: len(rows)] = rows
    return whole


def _linear_of(kind: Any, weight: Any, bias: Any) -> Any:
    with torch.device("meta"):
        made = kind(weight.shape[1], weight.shape[0])
    made.weight, made.bias = weight, bias
    return made


class FourBitLinear(nn.Module):
    """Stands in for bitsandbytes' `Linear4bit`: the product with the same numbers, decoded as they are multiplied.

    Args:
        module: a `Linear4bit`; its numbers are copied into another order.
        in_pairs: with rows in bfloat16, as bitsandbytes itself does where the processor can; else in float32.
    """

    def __init__(self, module: Any, in_pairs: bool = False) -> None:
        super().__init__()
        numbers, state = stored_pairs(module)
        self.in_features, self.out_features, self.dtype = module.in_features, module.out_features, torch.float32
        self.origin, self.state, self.compute_dtype = type(module), state, module.compute_dtype
        self.four_bits = panels.FourBits.from_pairs(numbers, scales_of(state), state.code, self.out_features, in_pairs)
        self.bias = module.bias

    @property
    def weight_bytes(self) -> int:
        return self.four_bits.nbytes

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, dense, in float32: a copy, made at each call."""
        return self.four_bits.dense()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        check_width(rows, self.in_features)
        if rows.requires_grad and torch.is_grad_enabled():
            return F.linear(rows.float(), self.weight, self.bias).to(rows.dtype)
        return self.four_bits.multiply(rows, self.bias)

    def original(self) -> Any:
        """A module of bitsandbytes' again."""
        from bitsandbytes.nn import Params4bit

        with torch.device("meta"):
            made = self.origin(self.in_features, self.out_features, self.bias is not None, self.compute_dtype)
        made.weight = Params4bit(
            self.four_bits.pairs().view(-1, 1), requires_grad=False, quant_state=self.state, blocksize=self.state.blocksize,
            compress_statistics=self.state.nested, quant_type=self.state.quant_type, module=made, bnb_quantized=True,
        )  # fmt: skip
        made.bias = self.bias
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As bitsandbytes saves its own."""
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination[prefix + "weight"] = self.four_bits.pairs().view(-1, 1)
        for name, part in self.state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = part if keep_vars else part.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        _stays(fn, self.dtype, convertible=True)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, quant_type={self.state.quant_type}"


def stored_pairs(module: Any) -> tuple[torch.Tensor, Any]:
    """A Linear4bit's numbers, two in a byte in the order of the weight, and what bitsandbytes knows of them.

    Once it has answered on some CPUs, bitsandbytes keeps the numbers in the order of its own kernel, and their scales rounded and
    turned; what undoes it there leaves the scales as they are.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight, state = module.weight.data, copy.copy(module.weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        scales, state.original_nested = state.absmax.t().reshape(-1).float(), False
        weight, state = _convert_weight_packed_for_cpu_inverse(weight, state)
        state.absmax = scales
    return weight.view(torch.uint8).reshape(-1), state


def scales_of(state: Any) -> torch.Tensor:
    """`[blocks]` float32: what the numbers of each block are multiplied with."""
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


class Int8Linear(nn.Module):
    """An `nn.Linear` whose weight was rounded to 8 bits: for drafts.

    Args:
        weight: `[out, in]`, dense; it is not kept.
        bias: `[out]` or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        layout = panels.EightBits if panels.eight_bits_available(self.in_features) else products.EightBits
        self.packed: panels.EightBits | products.EightBits = layout.of(weight)
        self.bias = None if bias is None else bias.detach().float()

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, dense and rounded: a copy, made at each call."""
        return self.packed.dense()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows."""
        check_width(rows, self.in_features)
        return self.packed.multiply(rows, self.bias)


def eight_bits_packable(ins: int) -> bool:
    """Whether a weight for so many inputs can be rounded to 8 bits and multiplied here."""
    return panels.eight_bits_available(ins) or products.int8_packable()


def draft_itemsize(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that `draft_linear` takes for each number of a weight."""
    return 1 if device.type == "cpu" and eight_bits_packable(4) else dtype.itemsize


def draft_linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The cheapest product of rows of this dtype with this weight that is to be had here, for drafts: they cost time if they are wrong, never a
    token."""
    if weight.device.type == "cpu" and eight_bits_packable(weight.shape[1]):
        return Int8Linear(weight, bias)
    weight = weight.detach().to(dtype)
    if weight.device.type == "cpu" and packable(weight.dtype, weight.shape[1]):
        return PackedLinear(weight, bias)
    plain: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return plain
