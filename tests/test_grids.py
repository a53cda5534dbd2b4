"""Weights that were quantized once, found again in the float32 numbers that they became."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import lossless
from lossless.adapter.compat import new_adapter
from lossless.base import packed
from lossless.base.linears import PackedLinear
from lossless.generation.model import accelerate
from lossless.kernels import grids, native
from lossless.kernels.grids import Grid

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler here")


def quantized(outs: int, ins: int, form: str, spread: float = 0.05) -> torch.Tensor:
    """`[out, in]` as the formats of GGUF have them: scales in 16 bits, numbers in a few."""

    def half(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * spread).half().float()

    def whole(low: int, high: int, block: int) -> torch.Tensor:
        return torch.randint(low, high, (outs, ins // block, block)).float()

    if form == "Q8_0":
        return (whole(-127, 128, 32) * half(outs, ins // 32, 1)).view(outs, ins)
    if form == "Q4_0":
        return (whole(-8, 8, 32) * half(outs, ins // 32, 1)).view(outs, ins)
    if form == "Q4_1":
        return (whole(0, 16, 32) * half(outs, ins // 32, 1) + half(outs, ins // 32, 1)).view(outs, ins)
    if form == "Q6_K":
        return (whole(-32, 32, 16) * (whole(-128, 128, 16)[..., :1] * half(outs, 1, 1) / 128).half().float()).view(outs, ins)
    raise ValueError(form)


@pytest.mark.parametrize(("form", "bits", "block"), [("Q8_0", 8, 32), ("Q4_0", 4, 32), ("Q4_1", 4, 32), ("Q6_K", 8, 16)])
@pytest.mark.parametrize("shape", [(64, 64), (70, 576), (3, 1536)], ids=str)
def test_nothing_is_lost_and_rows_keep_their_bits(shape: tuple[int, int], form: str, bits: int, block: int) -> None:
    weight = quantized(*shape, form)
    grid = Grid.of(weight)
    assert grid is not None
    assert (grid.bits, grid.block) == (bits, block)
    assert torch.equal(grid.dense(), weight)
    laid_out = -(-shape[0] // native.panel()) * native.panel() * shape[1]  # weights, with those of outputs that are not there
    assert grid.nbytes == laid_out * (bits / 8 + 8 / block)
    rows, bias = torch.randn(17, shape[1]), torch.randn(shape[0])
    expected = F.linear(rows.double(), weight.double(), bias.double())
    found = grid.multiply(rows, bias)
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    for size in (1, 2, 5, 12, 13):
        assert torch.equal(torch.cat([grid.multiply(some, bias) for some in rows.split(size)]), found)


@pytest.mark.parametrize("form", ["Q8_0", "Q4_1", "Q6_K"])
def test_rows_of_any_size_are_as_exact_as_in_float32(form: str) -> None:
    """Whether they become whole numbers on this processor, or not."""
    weight, rows = quantized(70, 576, form), torch.randn(9, 576)
    grid = Grid.of(weight)
    assert grid is not None
    rows[1] *= 1e-20
    rows[2] *= 1e20
    rows[3] *= torch.logspace(-9, 3, 576)
    rows[4, 100:400] = 0
    rows[5] = 0
    rows[6] = 1e-38
    found, expected = grid.multiply(rows, None), F.linear(rows.double(), weight.double())
    assert ((found - expected).abs() <= 1e-6 * F.linear(rows.double().abs(), weight.double().abs()) + 1e-28).all()
    for odd in (torch.nan, torch.inf, -torch.inf):
        rows[7, 300] = odd
        assert not grid.multiply(rows, None)[7].isfinite().any()
        assert torch.equal(grid.multiply(rows, None)[:7], found[:7])


@pytest.mark.parametrize("dense", ["q_proj", "v_proj", "up_proj", "down_proj"])
def test_in_a_layer_some_weights_stand_on_a_grid_and_others_do_not(dense: str) -> None:
    base = build_tiny(seed=5, hidden=128, inner=160)  # heads of 32
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(dense):
            module.weight.data.copy_(quantized(module.out_features, module.in_features, "Q6_K" if "k_proj" in name else "Q4_1", 0.02))
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), adaptive=False)
    assert fast.runner.fused
    assert {type(module.packed) for module in fast.runner.model.modules() if isinstance(module, PackedLinear)} > {Grid}
    expected, found = both(fast, prompt_ids(20))
    assert torch.equal(expected, found)


def test_zeros_and_equal_weights_stand_on_a_grid() -> None:
    weight = torch.zeros(40, 64)
    weight[3] = 0.25
    grid = Grid.of(weight)
    assert grid is not None
    assert torch.equal(grid.dense(), weight)


@pytest.mark.parametrize("neighbours", [(0, 2, 5, 7, 10, 12, 15, 13), (0, 6, 15, 9, 3, 12), (15, 0), (0, 10, 4, 14)], ids=str)
def test_the_step_is_found_where_no_two_neighbours_are_one_apart(neighbours: tuple[int, ...]) -> None:
    numbers = torch.tensor(neighbours).repeat(32)[:32].float()
    weight = (numbers * torch.tensor([1, 1999, 2**20])[:, None] - 2**21 + 1).repeat(1, 2) / 2**24
    grid = Grid.of(weight)
    assert grid is not None
    assert (grid.bits, torch.equal(grid.dense(), weight)) == (4, True)


@pytest.mark.parametrize("what", ["one off", "random", "nan", "infinite", "large", "64", "bfloat16", "odd"])
def test_other_weights_do_not(what: str) -> None:
    weight = quantized(80, 64, "Q4_1")
    if what == "one off":  # behind the outputs that are looked at first
        weight[77, 5] += 2.0**-20
        assert grids.itemsize(weight) == 0.75
    elif what in ("nan", "infinite", "large", "64"):  # distances from 64 on do not fit in whole numbers
        weight[79, 63] = {"nan": torch.nan, "infinite": torch.inf, "large": 1e30, "64": -64}[what]
    elif what == "random":
        weight = torch.randn(80, 64)
    elif what == "bfloat16":
        weight = weight.bfloat16()
    else:
        weight = quantized(80, 64, "Q4_1")[:, :48].contiguous()
    assert Grid.of(weight) is None
    if what not in ("one off", "nan", "infinite", "large", "64"):
        assert grids.itemsize(weight) is None


def test_a_model_whose_weights_were_quantized_is_served_through_them() -> None:
    base = build_tiny()
    for module in packed.structure_of(base).modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            module.weight.data.copy_(quantized(module.out_features, module.in_features, "Q4_1", 0.1))
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), adaptive=False)
    twins = [module for module in fast.runner.model.modules() if isinstance(module, PackedLinear)]
    assert any(isinstance(module.packed, Grid) for module in twins)
    for do_sample in (False, True):
        expected, found = both(fast, prompt_ids(20), 2, do_sample=do_sample, max_new_tokens=40)
        assert torch.equal(expected, found)

    lossless.pack(base)
    dense = sum(p.nbytes for name, p in before.items())
    assert packed.copied_bytes(base) < dense / 2
    again = copy.deepcopy(base)
    ids = prompt_ids(9)
    assert torch.equal(again(ids).logits, base(ids).logits)
    lossless.unpack(base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
