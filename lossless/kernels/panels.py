"""Weights laid out in panels, and products with them in C of our own (panels.h).

Knows: the layouts, what is lost in none of them, and how a product is called. Does not know: modules, or models.

    Panels      float32, bfloat16 or float16. Weights in float32 whose numbers are numbers of 16 bits, as those of almost every checkpoint
                are that is loaded so, are kept so: the same numbers, from half of the memory.
    Interleaved bfloat16 or float16, multiplied in torch's order where rows and weights are not multiplied as pairs
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
from .native import EIGHT_BITS, FOUR_BITS, INTERLEAVED, INTERLEAVED_FLOAT16, PAIRED_FOUR_BITS
from .pages import own_pages

_BLOCK = 64  # 4-bit numbers with one scale
ABREAST = 64  # sums that torch's own product has side by side, in eight registers
_HALVINGS = 6  # of them, until one is left
_LANES = 16  # sums that oneDNN's has, in one
_PROMPT = 256  # rows of a prompt that are multiplied together: they are laid out for it
_SOME = 1024  # outputs that are looked at together
_LOW_BITS = 0xFFFF  # of a number in float32: those that bfloat16 has not


def available(dtype: torch.dtype, ins: int) -> bool:
    """Whether weights of this dtype, for so many inputs, can be laid out and multiplied here."""
    return ins % 2 == 0 and native.available() and native.has_kernels(dtype) and _right()


def multiplies_pairs(ins: int) -> bool:
    """Whether rows and weights in bfloat16, of so many inputs, are multiplied as pairs here, in one rounding each."""
    return available(torch.bfloat16, ins) and bool(native.compiled().lossless_pairs())


def tile() -> int | None:
    """Inputs in bfloat16 that are added up together where the processor multiplies tiles (AMX): there up to 16 rows take as long as one."""
    return (native.compiled().lossless_tiles() or None) if native.available() else None


def interleaves(dtype: torch.dtype, ins: int) -> bool:
    """Whether a weight of this dtype for so many inputs can be multiplied in torch's order in sums of some of them."""
    if not (available(torch.bfloat16, ins) and native.knows_order()) or (dtype is torch.bfloat16 and multiplies_pairs(ins)):
        return False
    return ins % (2 if _by_lanes(dtype) else ABREAST) == 0


def _by_lanes(dtype: torch.dtype) -> bool:
    """Whether it is oneDNN that multiplies one row of this dtype: bfloat16 on processors with AVX-512."""
    return dtype is torch.bfloat16 and native.panel() == 2 * _LANES


def four_bits_available(ins: int) -> bool:
    """Whether 4-bit weights for so many inputs, in blocks of 64, can be."""
    return ins % _BLOCK == 0 and native.available() and _right()


def eight_bits_available(ins: int) -> bool:
    """Whether weights for so many inputs can be rounded to 8 bits and multiplied here."""
    return ins % 4 == 0 and native.available() and _right()


def itemsize(weight: torch.Tensor) -> int:
    """Bytes that each number of a weight `[out, in]` takes in panels."""
    return _smallest(weight).itemsize


def _smallest(weight: torch.Tensor) -> torch.dtype:
    """The dtype of the fewest bits that has the numbers of a weight, and kernels here."""
    if weight.dtype in native.SIXTEEN:
        return weight.dtype
    some = weight.detach().split(_SOME)
    if not any(bool((part.contiguous().view(torch.int32) & _LOW_BITS).any()) for part in some):
        return torch.bfloat16
    halves = native.has_kernels(torch.float16) and all(torch.equal(part.half().float(), part) for part in some)
    return torch.float16 if halves else weight.dtype


def _laid_out(numbers: torch.Tensor) -> torch.Tensor:
    """The same, in one piece."""
    return own_pages(*numbers.shape, dtype=numbers.dtype).copy_(numbers)


def _in_columns(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]` -> `[panels, in, panel]`; outputs that are not there are 0."""
    panel = native.panel()
    return _laid_out(F.pad(weight, (0, 0, 0, -len(weight) % panel)).view(-1, panel, weight.shape[1]).transpose(1, 2))


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight in float32 or 16 bits.

    Attributes:
        numbers: `[panels, in, panel]` float32 or float16, or `[panels, in / 2, panel, 2]` bfloat16; outputs that are not there are 0.
        outs: outputs.
        dtype: of the weight, which may be float32 where the numbers are not.
        chunk: inputs that are added up by themselves, and their sums in turn; None for all. Only for pairs of bfloat16. `tile()` of them are
            multiplied as tiles.
    """

    numbers: torch.Tensor
    outs: int
    dtype: torch.dtype
    chunk: int | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, chunk: int | None = None) -> Panels:
        """`[out, in]`, which is left as it is."""
        panel, (outs, ins), given = native.panel(), weight.shape, weight.detach().to(_smallest(weight)).contiguous()
        if given.dtype is torch.float16:
            return cls(_in_columns(given), outs, weight.dtype)
        panels = -(-outs // panel)
        shape = (ins // 2, panel, 2) if given.dtype == torch.bfloat16 else (ins, panel)
        numbers = own_pages(panels, *shape, dtype=given.dtype)
        native.compiled().lossless_lay(given.data_ptr(), outs, shape[0], numbers.data_ptr(), torch.get_num_threads())
        return cls(numbers, outs, weight.dtype, chunk)

    @property
    def kind(self) -> int:
        return native.KINDS[self.numbers.dtype]

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
    """A weight in 16 bits whose inputs are added up in several sums, and then these, in pairs.

    Attributes:
        numbers: `[panels, places / 2, panel, 2]` bfloat16, or `[panels, places, panel]` float16; where no input stands they are 0.
        outs, ins: outputs and inputs.
        order: `[places]` int32, the input at each place, -1 for none: those of a sum stand side by side, and so do sums that meet.
        chunk: inputs of a sum.
    """

    numbers: torch.Tensor
    outs: int
    ins: int
    order: torch.Tensor
    chunk: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Interleaved:
        """`[out, in]`, which is left as it is."""
        outs, ins = weight.shape
        order, chunk = _order(weight.dtype, ins)
        filled = F.pad(weight.detach(), (0, 1))[:, order.long()]  # -1 is the last one, and 0
        if weight.dtype is torch.bfloat16:
            return cls(Panels.of(filled).numbers, outs, ins, order, chunk)
        return cls(_in_columns(filled), outs, ins, order, chunk)

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    @property
    def kind(self) -> int:
        return INTERLEAVED if self.dtype is torch.bfloat16 else INTERLEAVED_FLOAT16

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes

    def dense(self) -> torch.Tensor:
        """`[out, in]`, what was laid out: a copy, made at each call."""
        filled = self.numbers.transpose(1, 2).reshape(-1, len(self.order))[: self.outs]
        dense = filled.new_empty(self.outs, self.ins + 1)
        dense[:, self.order.long()] = filled
        return dense[:, : self.ins]

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows, which are rounded to that of the weight."""
        pieces = rows.to(self.dtype).reshape(-1, self.ins).split(_PROMPT)
        done = [native.multiply(self.kind, self.numbers, self.outs, piece, bias, chunk=self.chunk, order=self.order) for piece in pieces]
        return (done[0] if len(done) == 1 else torch.cat(done)).view(*rows.shape[:-1], self.outs).to(rows.dtype)


@functools.cache
def _order(dtype: torch.dtype, ins: int) -> tuple[torch.Tensor, int]:
    """Of `Interleaved` weights order and chunk.

    torch itself adds up every 64th input, and of these sums in turn those that are half of all apart. oneDNN multiplies pairs, and adds up every
    16th pair, the second input of each before the first; of these sums those that are half of all apart, and then neighbours in turn.
    """
    side, each = (_LANES, 2) if _by_lanes(dtype) else (ABREAST, 1)
    turns = -(-ins // (side * each))
    if dtype is torch.bfloat16:
        turns += turns * each % 2  # inputs of a sum are laid out in pairs
    sums = torch.arange(side, device="cpu")
    meeting = sums.view(2, -1).t() if each == 2 else sums.view(*[2] * _HALVINGS).permute(*reversed(range(_HALVINGS)))
    places = torch.arange(turns * side * each, dtype=torch.int32, device="cpu").view(turns, side, each).flip(2)[:, meeting.flatten()].transpose(0, 1).flatten()
    return places.masked_fill(places >= ins, -1), turns * each


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
    products: list[Panels | FourBits | EightBits] = [four, EightBits.of(weight)]
    products += [Panels.of(weight.to(dtype)) for dtype in native.KINDS if native.has_kernels(dtype)]
    products += [Panels.of(weight.bfloat16(), native.compiled().lossless_tiles() or None)]
    for product in products:
        for rows in (torch.randn(15, 64, generator=generator, dtype=torch.float32), torch.randn(15, 64, generator=generator, dtype=torch.float32).bfloat16()):
            found, alone = (torch.cat([product.multiply(some, None) for some in rows.split(size)]) for size in (15, 1))
            off = 0.1 if isinstance(product, EightBits) else 1e-4 if rows.dtype == torch.float32 else 0.02
            expected = rows.float() @ product.dense().float().T
            if not torch.equal(found, alone) or not (found.float() - expected).abs().max() < off * expected.std():
                return False
    return True
