"""Weights in float32 that were quantized once, in the few bits that are in them.

Knows: that what a GGUF file gives (and others whose scales have 16 bits) stands, block by block, a small whole number of steps above the
least weight of its block, how such steps are found (grids.c), and products with them. Nothing is lost: the weights are the same float32
numbers, from a fifth of the memory. Does not know: files, modules, or models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import native
from .native import EIGHT_BIT_GRID, FOUR_BIT_GRID
from .pages import own_pages

_BLOCKS = (32, 16)  # inputs with one step, as GGUF's formats have them
_SOME = 64  # outputs that are looked at before all are


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight in float32 that stands on a grid.

    Attributes:
        numbers: `[panels, in / 4, lanes or panel, 4]` bytes, of which those of 4 bits hold two outputs' numbers (panels.FourBits).
        scales: `[panels, in / block, 2, panel]` float32: the step, and the least weight of a block.
        outs: outputs.
        bits: 4 or 8, of a number.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    outs: int
    bits: int
    dtype = torch.float32

    @classmethod
    def of(cls, weight: torch.Tensor) -> Grid | None:
        """`[out, in]`, which is left as it is; None if it stands on none."""
        laid = (cls._laid(weight.detach().contiguous(), *form) for form in _forms(weight))
        return next((grid for grid in laid if grid is not None), None)

    @classmethod
    def _laid(cls, weight: torch.Tensor, bits: int, block: int) -> Grid | None:
        panel, (outs, ins) = native.panel(), weight.shape
        panels = -(-outs // panel)
        numbers = own_pages(panels, ins // 4, panel * bits // 8, 4, dtype=torch.uint8)
        scales = own_pages(panels, ins // block, 2, panel)
        fits = native.compiled().lossless_lay_grid(
            weight.data_ptr(), outs, ins, block, bits, numbers.data_ptr(), scales.data_ptr(), torch.get_num_threads()
        )
        return cls(numbers, scales, outs, bits) if fits else None

    @property
    def kind(self) -> int:
        return FOUR_BIT_GRID if self.bits == 4 else EIGHT_BIT_GRID

    @property
    def block(self) -> int:
        """Inputs with one step."""
        return 4 * self.numbers.shape[1] // self.scales.shape[1]

    chunk = block  # as projections.h is told

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    def dense(self) -> torch.Tensor:
        """`[out, in]` in float32, what was laid out: a copy, made at each call."""
        numbers = torch.cat([self.numbers & 15, self.numbers >> 4], dim=2) if self.bits == 4 else self.numbers  # [panels, in / 4, panel, 4]
        step, least = self.scales.double().repeat_interleave(self.block // 4, dim=1)[..., None].unbind(2)  # [panels, in / 4, panel, 1]
        weights = (numbers * step + least).float().transpose(1, 2)
        return weights.reshape(-1, 4 * self.numbers.shape[1])[: self.outs]

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of the rows."""
        return native.multiply(self.kind, self.numbers, self.outs, rows, bias, self.scales, chunk=self.block)


def itemsize(weight: torch.Tensor) -> float | None:
    """Bytes that each number of a weight `[out, in]` takes on its grid, as some of its outputs have it; None if they stand on none."""
    return next((bits / 8 + 8 / block for bits, block in _forms(weight)), None)


def _forms(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Bits, and inputs with one step, of the grids on which some outputs of a weight stand, the smallest first."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[1] % _BLOCKS[0] or not native.available() or not _right():
        return
    some = weight.detach()[:_SOME].contiguous()
    for block in _BLOCKS:
        for bits in (4, 8):
            if Grid._laid(some, bits, block) is not None:
                yield bits, block


@functools.cache
def _right() -> bool:
    """Whether what is laid out is found again, and multiplied as torch does, each row by itself; tested at the first call."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(15, 64, generator=generator, dtype=torch.float32)
    for bits, block in ((4, 32), (4, 16), (8, 32), (8, 16)):
        steps, least = (torch.randint(-999, 999, (70, 64 // block, 1), generator=generator).float() / 2**16 for _ in range(2))
        weight = (torch.randint(2**bits, (70, 64 // block, block), generator=generator) * steps + least).view(70, 64)
        grid = Grid._laid(weight, bits, block)
        if grid is None or not torch.equal(grid.dense(), weight):
            return False
        found, alone = (torch.cat([grid.multiply(some, None) for some in rows.split(size)]) for size in (15, 1))
        if not torch.equal(found, alone) or not torch.allclose(found, rows @ weight.T, rtol=1e-4, atol=1e-4 * float(weight.abs().max())):
            return False
    return True
