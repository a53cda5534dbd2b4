"""Weights of modules as C is told of them (projections.h).

Knows: which modules have weights in panels, and where those stand. Does not know: what is computed of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.grids import Grid
from ..kernels.panels import EightBits, Interleaved, Panels
from .linears import FourBitLinear, Int8Linear, PackedLinear


class Weight(ctypes.Structure):
    """A weight, and its bias."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "ins", "outs", "chunk", "places")), ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("scales", "code", "bias", "order")),
    ]  # fmt: skip

    @classmethod
    def of(cls, part: Any, kept: list[torch.Tensor]) -> Weight:
        """That of a module which is `multipliable`. To `kept` go the tensors that it points to."""
        if isinstance(part, FourBitLinear):
            kind, tensors = part.four_bits.kind, [part.four_bits.numbers, part.four_bits.scales, part.four_bits.code]
        else:
            scales = [part.packed.scales] if isinstance(part.packed, EightBits | Grid) else []
            kind, tensors = part.packed.kind, [part.packed.numbers, *scales]
        chunk = getattr(getattr(part, "packed", None), "chunk", None) or part.in_features
        bias, order = None if part.bias is None else part.bias.detach().float().contiguous(), getattr(getattr(part, "packed", None), "order", None)
        given = [*tensors, *[None] * (3 - len(tensors)), bias, order]
        kept += [tensor for tensor in given if tensor is not None]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
        return cls(kind, part.in_features, part.out_features, chunk, 0 if order is None else len(order), *pointers)


def multipliable(parts: Sequence[Any]) -> bool:
    """Whether these modules have weights that C multiplies with the same rows: in panels, and all or none of them rounded to 8 bits."""
    rounded = [isinstance(getattr(part, "packed", None), EightBits) for part in parts]
    return all(map(_in_panels, parts)) and len(set(rounded)) == 1


def _in_panels(part: Any) -> bool:
    return isinstance(part, FourBitLinear) or (isinstance(part, PackedLinear | Int8Linear) and isinstance(part.packed, Panels | Interleaved | Grid | EightBits))
