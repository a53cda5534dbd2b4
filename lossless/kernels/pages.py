"""Tensors on a CPU whose memory does not come from malloc.

Knows: that what stays and what is needed for a moment should not lie side by side in one heap, whose holes the system is not given back;
and that weights which are read from end to end in every pass are read faster from pages of 2 MiB (where Linux gives them when asked,
`/sys/kernel/mm/transparent_hugepage`). Does not know: what the numbers are.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_SMALLEST = 2**16  # bytes from which on a tensor has pages of its own
_PAGE, _HUGE, _SLAB = 2**12, 2**21, 2**26


class _Slabs:
    """Regions that tensors are cut from, each from the first that has room. A region is given back when its last tensor is."""

    def __init__(self) -> None:
        self.used: list[tuple[mmap.mmap, int]] = []  # regions, and the bytes of each that are taken

    def cut(self, wanted: int) -> tuple[mmap.mmap, int]:
        """A region, and where in it there is room for so many bytes."""
        wanted = -(-wanted // _PAGE) * _PAGE
        number = next((number for number, (region, used) in enumerate(self.used) if used + wanted <= len(region)), len(self.used))
        if number == len(self.used):
            self.used.append((_region(max(_SLAB, -(-wanted // _HUGE) * _HUGE)), 0))
        region, offset = self.used[number]
        self.used[number] = region, offset + wanted
        return region, offset


_TOGETHER: ContextVar[_Slabs | None] = ContextVar("together", default=None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is made in this context, and stays as long, shares large pages."""
    before = _TOGETHER.set(_Slabs())
    try:
        yield
    finally:
        _TOGETHER.reset(before)


def own_pages(*shape: int, dtype: torch.dtype = torch.float32, apart: bool = False) -> torch.Tensor:
    """Zeros of this shape, which no process that is forked writes into.

    apart: they do not stay as long as what is made `together`.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    slabs = None if apart else _TOGETHER.get()
    region, offset = (_region(count * dtype.itemsize), 0) if slabs is None else slabs.cut(count * dtype.itemsize)
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(shape)


def _region(size: int) -> mmap.mmap:
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE:
        with contextlib.suppress(AttributeError, OSError):  # another system, or a kernel without such pages
            region.madvise(mmap.MADV_HUGEPAGE)
    return region
