"""Weights laid out in panels, and products with them in C of our own (panels.h).

Knows: the layouts, what is lost in none of them, and how a product is called. Does not know: modules, or models.

    Panels      float32 or bfloat16. Weights in float32 whose numbers are numbers of bfloat16, as those of almost every checkpoint are
                that is loaded so, are kept in 16 bits: the same numbers, from half of the memory.
    Interleaved bfloat16, multiplied in torch's order on processors with AVX2
    FourBits    4-bit numbers in blocks of 64, as bitsandbytes makes them
    EightBits   rounded to 8 bits, with a scale for each output: for drafts, which may be wrong

Sums are in float32, and a row has the same bits beside any number of others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import native
from .native import BFLOAT16, EIGHT_BITS, FLOAT32, FOUR_BITS, INTERLEAVED, PAIRED_FOUR_BITS
from .pages import own_pages

_BLOCK = 64  # 4-bit numbers with one scale
ABREAST = 64  # sums that torch has side by side on processors with AVX2, in eight registers
_SOME = 1024  # outputs that are looked at together
_LOW_BITS = 0xFFFF  # of a number in float32: those that bfloat16 has not


def available(dtype: torch.dtype, ins: int) -> bool:
    """Whether weights of this dtype, for so many inputs, can be laid out and multiplied here."""
    return dtype in (torch.float32, torch.bfloat16) and ins % 2 == 0 and native.available() and _right()


def multiplies_pairs(ins: int) -> bool:
    """Whether rows and weights in bfloat16, of so many inputs, are multiplied as pairs here, in one rounding each."""
    return available(torch.bfloat16, ins) and bool(native.compiled().lossless_pairs())


def interleaves(ins: int) -> bool:
    """Whether a weight in bfloat16 for so many inputs can be multiplied in torch's order on processors with AVX2, and this is one."""
    return ins % ABREAST == 0 and available(torch.bfloat16, ins) and bool(native.compiled().lossless_exact()) and not multiplies_pairs(ins)


def four_bits_available(ins: int) -> bool:
    """Whether 4-bit weights for so many inputs, in blocks of 64, can be."""
    return ins % _BLOCK == 0 and native.available() and _right()


def eight_bits_available(ins: int) -> bool:
    """Whether weights for so many inputs can be rounded to 8 bits and multiplied here."""
    return ins % 4 == 0 and native.available() and _right()


def itemsize(weight: torch.Tensor) -> int:
    """Bytes that each number of a weight `[out, in]` takes in panels."""
    if weight.dtype == torch.bfloat16:
        return 2
    some = weight.detach().split(_SOME)
    return 4 if any(bool((part.contiguous().view(torch.int32) & _LOW_BITS).any()) for part in some) else 2


def _laid_out(numbers: torch.Tensor) -> torch.Tensor:
    """The same, in one piece."""
    return own_pages(*numbers.shape, dtype=numbers.dtype).copy_(numbers)


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight in float32 or bfloat16.

    Attributes:
        numbers: `[panels, in, panel]` float32, or `[panels, in / 2, panel, 2]` bfloat16; outputs that are not there are 0.
        outs: outputs.
        dtype: of the weight, which may be float32 where the numbers are not.
        chunk: inputs that are added up by themselves, and their sums in turn; None for all. Only for pairs of bfloat16.
    """

    numbers: torch.Tensor
    outs: int
    dtype: torch.dtype
    chunk: int | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, chunk: int | None = None) -> Panels:
        """`[out, in]`, which is left as it is."""
        panel, (outs, ins), given = native.panel(), weight.shape, weight.detach()
        panels, given = -(-outs // panel), (given.to(torch.bfloat16) if itemsize(weight) == 2 else given).contiguous()
        shape = (ins // 2, panel, 2) if given.dtype == torch.bfloat16 else (ins, panel)
        numbers = own_pages(panels, *shape, dtype=given.dtype)
        native.compiled().lossless_lay(given.data_ptr(), outs, shape[0], numbers.data_ptr(), torch.get_num_threads())
        return cls(numbers, outs, weight.dtype, chunk)

    @property
    def kind(self) -> int:
        return BFLOAT16 if self.numbers.dtype == torch.bfloat16 else FLOAT32

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes

    def dense(self) -> torch.Tensor:
        """`[out, in]`, what was laid out: a copy, made at each call."""
        blocks = self.numbers.transpose(1, 2)  # [panels, panel, in or in / 2 and 2]
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)[: self.outs].to(self.dtype)

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows."""
        return native.multiply(self.kind, self.numbers, self.outs, rows, bias, chunk=self.chunk)


@dataclass(frozen=True, eq=False)
class Interleaved:
    """A weight in bfloat16 of which every 64th input is added up by itself, and then these sums, in pairs.

    Attributes:
        numbers: `[panels, 64 * each / 2, panel, 2]`: of each sum its `each` inputs, of which the last may be 0, in the order in which sums meet.
        outs, ins: outputs and inputs.
    """

    numbers: torch.Tensor
    outs: int
    ins: int
    dtype = torch.bfloat16
    kind = INTERLEAVED

    @classmethod
    def of(cls, weight: torch.Tensor) -> Interleaved:
        """`[out, in]` bfloat16, inputs a multiple of 64; it is left as it is."""
        outs, ins = weight.shape
        filled = F.pad(weight.detach(), (0, -ins % (2 * ABREAST))).view(outs, -1, ABREAST)  # a number of inputs that can be had in pairs
        return cls(Panels.of(filled[:, :, _meeting()].transpose(1, 2).reshape(outs, -1)).numbers, outs, ins)

    @property
    def chunk(self) -> int:
        """Inputs of each sum, as projections.h is told."""
        return 2 * self.numbers.shape[1] // ABREAST

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes

    def dense(self) -> torch.Tensor:
        """`[out, in]`, what was laid out: a copy, made at each call."""
        filled = Panels(self.numbers, self.outs, self.dtype).dense().view(self.outs, ABREAST, -1)
        return filled[:, _meeting().argsort()].transpose(1, 2).reshape(self.outs, -1)[:, : self.ins]

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, both bfloat16."""
        return native.multiply(self.kind, self.numbers, self.outs, rows.bfloat16(), bias, chunk=self.chunk).to(rows.dtype)


@functools.cache
def _meeting() -> torch.Tensor:
    """`[64]`: the sums in the order in which they meet: first those that are half of all apart, so that each place is the number with its bits in
    reverse."""
    return torch.tensor([int(f"{place:06b}"[::-1], 2) for place in range(ABREAST)])


@dataclass(frozen=True, eq=False)
class FourBits:
    """A weight in 4 bits.

    Attributes:
        numbers: `[panels, in / 4, lanes, 4]` bytes: of each the low half is an output's number, the high half that of the output
            `lanes` behind it.
        scales: `[panels, in / 64, panel]` float32, one for each block of 64 inputs of an output.
        code: `[16]` float32, what each number stands for.
        outs: outputs.
        in_pairs: rows, scales and code are rounded to bfloat16, and a block is added up in pairs before it is scaled, as bitsandbytes
            multiplies them on processors that can.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    outs: int
    in_pairs: bool = False

    @classmethod
    def from_pairs(cls, pairs: torch.Tensor, scales: torch.Tensor, code: torch.Tensor, outs: int, in_pairs: bool = False) -> FourBits:
        """From bytes that hold two neighbours each, the first in the high half, as bitsandbytes stores them."""
        if in_pairs:
            scales, code = scales.bfloat16(), code.bfloat16()
        panel = native.panel()
        four = torch.stack([pairs.reshape(-1) >> 4, pairs.reshape(-1) & 15], dim=-1).view(outs, -1)  # [out, in]
        four = F.pad(four, (0, 0, 0, -outs % panel)).view(-1, 2, panel // 2, four.shape[1] // 4, 4)
        numbers = _laid_out((four[:, 0] | four[:, 1] << 4).transpose(1, 2))
        each = F.pad(scales.float().view(outs, -1), (0, 0, 0, -outs % panel))
        return cls(numbers, _laid_out(each.view(-1, panel, each.shape[1]).transpose(1, 2)), code.float().contiguous(), outs, in_pairs)

    @property
    def kind(self) -> int:
        return PAIRED_FOUR_BITS if self.in_pairs else FOUR_BITS

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    def pairs(self) -> torch.Tensor:
        """`[out * in / 2]` bytes, in the order that they came in."""
        found = self._numbers().view(-1, 2)
        return found[:, 0] << 4 | found[:, 1]

    def dense(self) -> torch.Tensor:
        """`[out, in]` in float32: a copy, made at each call."""
        scales = self.scales.transpose(1, 2).reshape(-1, self.scales.shape[1])[: self.outs]
        return (self.code[self._numbers().long()].view(self.outs, -1, _BLOCK) * scales[..., None]).view(self.outs, -1)

    def _numbers(self) -> torch.Tensor:
        both = torch.stack([self.numbers & 15, self.numbers >> 4], dim=1)  # [panels, 2, in / 4, lanes, 4]
        return both.transpose(2, 3).reshape(len(both) * both.shape[1] * both.shape[3], -1)[: self.outs]  # [out, in]

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows."""
        if self.in_pairs:
            out = native.multiply(self.kind, self.numbers, self.outs, rows.bfloat16(), None, self.scales, self.code).to(rows.dtype)
            return out if bias is None else out + bias
        return native.multiply(self.kind, self.numbers, self.outs, rows, bias, self.scales, self.code)


@dataclass(frozen=True, eq=False)
class EightBits:
    """A weight rounded to 8 bits.

    Attributes:
        numbers: `[panels, in / 4, panel, 4]` int8.
        scales: `[panels, 2, panel]` float32, of each output what its sum is multiplied with, and, in bits of int32, the sum of its numbers.
        outs: outputs.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    outs: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> EightBits:
        """`[out, in]`, rounded."""
        panel, (outs, ins), given = native.panel(), weight.shape, weight.detach().float().contiguous()
        panels = -(-outs // panel)
        numbers, scales = own_pages(panels, ins // 4, panel, 4, dtype=torch.int8), own_pages(panels, 2, panel)
        native.compiled().lossless_lay_bytes(given.data_ptr(), outs, ins, numbers.data_ptr(), scales.data_ptr(), torch.get_num_threads())
        return cls(numbers, scales, outs)

    @property
    def kind(self) -> int:
        return EIGHT_BITS

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    def dense(self) -> torch.Tensor:
        """`[out, in]` in float32, as it was rounded."""
        scales = self.scales[:, 0].reshape(-1, 1)
        return (self.numbers.transpose(1, 2).reshape(len(scales), -1) * scales)[: self.outs]

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows, which are rounded, too."""
        return native.multiply(self.kind, self.numbers, self.outs, rows, bias, self.scales)


@functools.cache
def _right() -> bool:
    """Whether products here are those of torch, and keep the bits of a row beside others; tested at the first call."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 64, generator=generator, dtype=torch.float32)
    pairs = torch.randint(256, (70 * 32,), generator=generator, dtype=torch.uint8)
    four = FourBits.from_pairs(pairs, torch.rand(70, generator=generator, dtype=torch.float32), torch.randn(16, generator=generator, dtype=torch.float32), 70)
    for product in (Panels.of(weight), Panels.of(weight.bfloat16()), four, EightBits.of(weight)):
        for rows in (torch.randn(15, 64, generator=generator, dtype=torch.float32), torch.randn(15, 64, generator=generator, dtype=torch.float32).bfloat16()):
            found, alone = (torch.cat([product.multiply(some, None) for some in rows.split(size)]) for size in (15, 1))
            off = 0.1 if isinstance(product, EightBits) else 1e-4 if rows.dtype == torch.float32 else 0.02
            expected = rows.float() @ product.dense().float().T
            if not torch.equal(found, alone) or not (found.float() - expected).abs().max() < off * expected.std():
                return False
    return True
