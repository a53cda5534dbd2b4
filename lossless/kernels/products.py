"""Products of rows with a weight that was packed once.

Knows: torch's private operators for packed weights, how to look for them, and whether what they give is right here. Nothing
else in the project names them: torch has no public way to pack in eager mode. Does not know: modules, or models.

    Packed                    oneDNN's blocked layout. A row has the same bits in a product of 2 to 32 rows, and mostly of 1
                              (`least_rows` says which): what it multiplies is laid out once, so that sums run in one order.
    EightBits                 8-bit weights, a scale for each output, rows rounded as they come: for drafts, which may be wrong.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_HINT = 8  # rows that the layout is chosen for: with 1, rows would not keep their bits
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the spread of a product
_CLOSE_INT8 = 0.2
_FAILURES = (RuntimeError, AttributeError, NotImplementedError, TypeError)  # an operator that is not there, or refuses


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight `[out, in]` in oneDNN's layout.

    Attributes:
        packed: the same numbers in that layout.
        least: the fewest rows of a product that keep their bits.
    """

    packed: torch.Tensor
    least: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Packed:
        """`[out, in]`, which is left as it is."""
        return cls(_pack(weight), least_rows(weight.shape[1], weight.shape[0], weight.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        return self.packed.numel() * self.dtype.itemsize

    def dense(self) -> torch.Tensor:
        """`[out, in]`, what was packed: a copy, made at each call."""
        return self.packed.to_dense()

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.least == 1 or rows.numel() > rows.shape[-1]:
            return _multiply(rows, self.packed, bias)
        both = _multiply(rows.reshape(1, -1).expand(self.least, -1), self.packed, bias)
        return both[:1].reshape(*rows.shape[:-1], -1)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _HINT)


def _multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


@functools.cache
def packable(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed here, and their products are right; tested at the first call."""
    if dtype not in _CLOSE:
        return False
    try:
        return _right(dtype, _CLOSE[dtype], lambda rows, weight: _multiply(rows, _pack(weight), None))
    except _FAILURES:
        return False


@dataclass(frozen=True, eq=False)
class EightBits:
    """A weight `[out, in]` rounded to 8 bits, with a scale for each output.

    Attributes:
        packed: what torch keeps of it.
    """

    packed: Any

    @classmethod
    def of(cls, weight: torch.Tensor) -> EightBits:
        """`[out, in]`, rounded."""
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-12).double() / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to move quantization elsewhere; until then this is where it is
            quantized = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
            return cls(torch.ops.quantized.linear_prepack(quantized, None))

    def dense(self) -> torch.Tensor:
        """`[out, in]` in float32, as it was rounded."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows, which are rounded, too."""
        out = torch.ops.quantized.linear_dynamic(rows.float(), self.packed)
        return (out if bias is None else out + bias).to(rows.dtype)


@functools.cache
def int8_packable() -> bool:
    """Whether 8-bit products are to be had here, and about right; tested at the first call."""
    try:
        return _right(torch.float32, _CLOSE_INT8, lambda rows, weight: EightBits.of(weight).multiply(rows, None))
    except _FAILURES:
        return False


def _right(dtype: torch.dtype, close: float, product: Any) -> bool:
    """Whether a product is that of torch, for one row and for several."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator, dtype=torch.float32).to(dtype)
    for count in (1, 2, 5):
        rows = torch.randn(count, 64, generator=generator, dtype=torch.float32).to(dtype)
        expected = F.linear(rows.float(), weight.float())
        if not float((product(rows, weight).float() - expected).abs().max()) < close * float(expected.std()):
            return False
    return True


@functools.cache
def least_rows(ins: int, outs: int, dtype: torch.dtype) -> int:
    """The fewest rows of a product in which each has the bits that it has in a larger one: 1, or 2 where oneDNN goes about one
    row in a way of its own (some processors, long rows). A single row is then multiplied beside a copy of itself."""
    generator = torch.Generator().manual_seed(0)
    packed = _pack(torch.randn(min(outs, 1024), ins, generator=generator, dtype=torch.float32).to(dtype))
    rows = torch.randn(16, ins, generator=generator, dtype=torch.float32).to(dtype)
    alone = torch.cat([_multiply(row[None], packed, None) for row in rows])
    return 1 if torch.equal(alone, _multiply(rows, packed, None)) else 2
