"""What was probed under other conditions is probed again at the next call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lossless.adapter.compat import new_adapter
from lossless.base.packed import pack
from lossless.errors import UsageError
from lossless.generation import attach as module
from lossless.generation import verdict
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.kernels import native

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[Any]:
    """The passes that are probed for, with an empty cache."""
    found: list[Any] = []
    real = module.find_guarantee
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(module, "find_guarantee", lambda reader, wanted, passes, *rest: found.append(passes) or real(reader, wanted, passes, *rest))
    return found


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """What a test changes in torch is changed back."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def attached(**options: Any) -> AcceleratedModel:
    model = build_tiny(seed=5)
    return accelerate(model, new_adapter(model, tiny_config()).randomize(2), **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.to(torch.bfloat16),
        lambda model: torch.set_float32_matmul_precision("medium"),
    ],
    ids=["threads", "attention", "dtype", "precision of products"],
)
def test_other_conditions_are_noticed_at_the_next_call(change: Callable[[PreTrainedModel], object], probed: list[Any]) -> None:
    fast = attached()
    both(fast, prompt_ids())
    assert len(probed) == 1
    change(fast.base)
    for seed in (3, 4):
        expected, found = both(fast, prompt_ids(seed=seed))
        assert torch.equal(expected, found)
        assert fast.stats.served
    assert len(probed) == 2
    assert fast.reader.implementation == fast.base.config._attn_implementation


def test_under_autocast_the_base_itself_answers(probed: list[Any]) -> None:
    fast = attached()
    plain = fast.guarantee
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(UserWarning, match="not accelerated: autocast is on"):
            expected, found = both(fast, prompt_ids())
        assert not fast.stats.served
        assert attached().guarantee == plain  # autocast or not, the weights are what is probed
    assert torch.equal(expected, found)
    both(fast, prompt_ids())
    assert fast.stats.served
    assert len(probed) == 1


def test_more_rows_or_streams_than_were_probed_are_probed(probed: list[Any]) -> None:
    fast = attached(tree_nodes=6, schedule="deferred")
    assert [(passes.rows, passes.streams) for passes in probed] == [(6, False)]
    fast.drafting = replace(fast.drafting, tree_nodes=4)
    both(fast, prompt_ids())
    assert len(probed) == 1
    fast.drafting = replace(fast.drafting, tree_nodes=24)
    expected, found = both(fast, prompt_ids())
    assert torch.equal(expected, found)
    fast.drafting = replace(fast.drafting, schedule="parallel")
    expected, found = both(fast, prompt_ids())
    assert torch.equal(expected, found)
    assert [(passes.rows, passes.streams) for passes in probed[1:]] == [(24, False), (24, True)]


def test_a_part_of_drafting_is_not_set_in_passing() -> None:
    fast = attached(tree_nodes=6)
    with pytest.raises(UsageError, match=r"fast\.drafting = replace\(fast\.drafting, tree_nodes=4\)"):
        fast.tree_nodes = 4  # type: ignore[attr-defined]
    assert fast.drafting.tree_nodes == 6


class _Steering:
    """A hook that keeps in mind by how much it moves hidden states."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, module: Any, given: Any, out: Any) -> Any:
        moved = torch.linspace(-self.by, self.by, 32)
        return (out[0] + moved, *out[1:]) if isinstance(out, tuple) else out + moved


def test_a_hook_in_the_place_of_another_and_one_that_changes_its_mind_are_noticed() -> None:
    fast, said = attached(), []
    layer = fast.base.model.layers[1]
    steering = _Steering(3.0)
    handles: list[Any] = []
    for step in ("none", "a hook", "another", "by less", "none again"):
        if step in ("another", "none again"):
            handles.pop().remove()
        if step in ("a hook", "another"):
            handles.append(layer.register_forward_hook(_Steering(-2.0) if step == "a hook" else steering))
        if step == "by less":
            steering.by = 1.0
        expected, found = both(fast, prompt_ids())
        assert torch.equal(expected, found), step
        said.append(expected)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(said))
    assert torch.equal(said[0], said[-1])


@pytest.mark.parametrize("packed", [False, True])
def test_hooks_of_every_module_are_heard(packed: bool) -> None:
    model = build_tiny(seed=5, hidden=128, inner=160)
    fast = accelerate(pack(model) if packed else model, new_adapter(model, tiny_config()).randomize(2))
    before, _ = both(fast, prompt_ids())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: out * 1.5 if type(module).__name__ == "LlamaMLP" else None)
    try:
        expected, found = both(fast, prompt_ids())
        assert not torch.equal(expected, before)
        assert torch.equal(expected, found)
        fresh = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
        expected, found = both(fresh, prompt_ids())
        assert torch.equal(expected, found)
        assert not fresh.runner.fused
    finally:
        handle.remove()
    assert torch.equal(before, both(fast, prompt_ids())[1])


def test_a_weight_that_is_written_to_behind_torchs_back_is_noticed(probed: list[Any]) -> None:
    fast = attached()
    before, _ = both(fast, prompt_ids())
    weight = fast.base.model.layers[1].self_attn.q_proj.weight
    version = weight._version
    weight.data.mul_(3.0)
    assert weight._version == version
    expected, found = both(fast, prompt_ids())
    assert not torch.equal(expected, before)
    assert torch.equal(expected, found)
    assert len(probed) == 2


def test_a_verdict_of_other_kernels_is_not_this_one_s(probed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    attached(), attached()
    assert len(probed) == 1
    monkeypatch.setattr(native, "name", lambda: "made by another compiler")
    attached()
    assert len(probed) == 2
