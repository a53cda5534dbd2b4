"""Tensors in pages of their own."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import warnings

import pytest
import torch

from lossless.kernels.pages import own_pages, together

from .robustness.report import resident_mib

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere they are torch's own")
_MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(), (3, 5), (300, 700), (2, 0, 7)], ids=str)
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = own_pages(*shape, dtype=dtype)
    assert (made.shape, made.dtype, bool(made.any())) == (shape, dtype, False)
    made.fill_(3)
    assert bool((made == 3).all())


def test_what_is_made_together_lies_side_by_side_and_never_overlaps() -> None:
    with together():
        made = [own_pages(70_000 + 1_000 * i, dtype=torch.uint8) for i in range(2_000)]  # of more than one slab
        apart = own_pages(100_000, dtype=torch.uint8, apart=True)
    made.append(apart)
    for number, tensor in enumerate(made):
        tensor.fill_(number % 251)
    assert all(bool((tensor == number % 251).all()) for number, tensor in enumerate(made))
    steps = [after.data_ptr() - before.data_ptr() - before.nbytes for before, after in itertools.pairwise(made[:-1])]
    assert sum(0 <= step < 4096 for step in steps) > 0.9 * len(steps)
    assert all(tensor.data_ptr() % 4096 == 0 for tensor in made)


def test_what_is_small_fills_what_large_ones_left() -> None:
    with together():
        first, _, small = (own_pages(size * _MIB, dtype=torch.uint8) for size in (40, 40, 20))
    assert small.data_ptr() == first.data_ptr() + first.nbytes


def test_they_are_given_back_when_they_are_freed() -> None:
    before = resident_mib()
    with together():
        made = [own_pages(_MIB, dtype=torch.uint8).fill_(1) for _ in range(128)]
    assert resident_mib() > before + 100
    del made[:]
    gc.collect()
    assert resident_mib() < before + 20


def test_a_forked_process_does_not_write_into_them() -> None:
    made = own_pages(100_000, dtype=torch.uint8)
    with warnings.catch_warnings():  # Python's, of threads that a fork leaves behind: the child does nothing that could wait for one
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        made.numpy()[:] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not made.any()


def test_a_copy_is_whole() -> None:
    with together():
        made = own_pages(200, 500).fill_(2)
    assert torch.equal(made.clone(), made)
    assert made.clone().untyped_storage().nbytes() == made.nbytes
