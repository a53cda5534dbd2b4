"""What steps cost is measured once, kept by what it depends on, and decides whether drafts are worth it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.drafting.costs import CostCurve
from lossless.generation import loop
from lossless.generation import measure as module
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.generation.stats import Stats
from lossless.kernels import native
from lossless.streams.passes import read_plainly

from .conformance.families import build
from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both


def attached(**options: Any) -> AcceleratedModel:
    model = build_tiny(seed=5)
    return accelerate(model, new_adapter(model, tiny_config()).randomize(2), **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[CostCurve]:
    """The measurements that are made, with an empty cache."""
    found: list[CostCurve] = []
    real = module.measure
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(module, "measure", lambda *given: found.append(real(*given)) or found[-1])
    return found


def test_costs_are_measured_once_for_each_base_and_setting(measured: list[CostCurve], tmp_path: Path) -> None:
    first = attached()
    assert len(measured) == 1
    assert first.costs == measured[0]
    assert attached().costs == first.costs
    assert len(measured) == 1
    assert first.measure_costs() == first.costs == measured[1]  # asked for anew
    model = build_tiny(seed=5)
    accelerate(model, new_adapter(model, tiny_config(tree_nodes=8)))
    assert len(measured) == 3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        attached()
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 4
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("costs/*.json")]
    assert {CostCurve.from_dict(file["curve"]) for file in kept} == set(measured[1:])  # the first was measured again
    assert all(file["depends_on"]["twin"] for file in kept)


@pytest.mark.skipif(not native.available(), reason="no kernels on this machine: they take gcc")
def test_a_curve_is_of_the_layout_that_weights_have(measured: list[CostCurve]) -> None:
    for base in (build_tiny(seed=5), build_tiny(seed=5).bfloat16().float()):  # the second is laid out in half of the memory
        accelerate(base, new_adapter(base, tiny_config()).randomize(2))
    assert len(measured) == 2


def test_a_broken_or_unwritable_cache_costs_a_measurement(measured: list[CostCurve], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attached()
    [path] = tmp_path.glob("costs/*.json")
    for content in ("", "{", "[]", '{"curve": {"plain_s": "fast"}}', '{"curve": {"plain_s": -1, "rows": [1], "pass_s": [1], "streams_s": 1, "level_s": 1}}'):
        path.write_text(content)
        before = len(measured)
        assert attached().costs == measured[-1]
        assert len(measured) == before + 1
    path.unlink()
    (tmp_path / "costs").rmdir()
    (tmp_path / "costs").write_text("no folder")
    assert attached().costs == measured[-1]


def test_a_curve_has_every_part_and_never_falls(measured: list[CostCurve]) -> None:
    costs = attached().costs
    assert costs.rows == tuple(n for n in module._ROWS if n <= 20)
    assert list(costs.pass_s) == sorted(costs.pass_s)
    assert costs.streams_s > 0 < costs.level_s


@pytest.mark.parametrize("family", ["gpt2", "mistral", "falcon"])
def test_short_position_tables_and_windows_are_no_obstacle(family: str, measured: list[CostCurve]) -> None:
    model = build(family)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    assert fast.costs == measured[0]
    expected, found = both(fast, prompt_ids(), max_new_tokens=16)
    assert torch.equal(expected, found)


def drafting(fast: AcceleratedModel, seen: list[bool]) -> None:
    """Note for each tree whether streams drafted it."""
    real = fast.drafter.trees
    fast.drafter.trees = lambda streams, *rest: seen.append(streams is not None) or real(streams, *rest)  # type: ignore[method-assign]


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_drafts_that_do_not_pay_are_left_out_and_tried_again(schedule: str, do_sample: bool) -> None:
    fast, seen = attached(schedule=schedule, recall=False), []
    fast.costs = CostCurve(1.0, (1, 32), (1.0, 1.5), streams_s=0.8, level_s=0.05)  # a random adapter's drafts never give that much
    drafting(fast, seen)
    expected, found = both(fast, prompt_ids(), max_new_tokens=150, do_sample=do_sample)
    assert torch.equal(expected, found)
    assert seen[:4] == [True] * 4
    assert 4 < sum(seen) < len(seen) / 4
    assert fast.stats.speculated <= (20 * sum(seen) if schedule == "parallel" else 0)
    fast.drafting = replace(fast.drafting, adaptive=False)
    seen.clear()
    both(fast, prompt_ids(), max_new_tokens=150, do_sample=do_sample)
    assert all(seen)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_while_drafts_are_left_out_the_base_itself_is_called_and_the_next_answer_begins_with_that(
    do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossless.generation.attach.packed_twin", lambda base: None)  # through which plain steps go, too
    fast, calls = attached(recall=False), []
    fast.costs = CostCurve(1e-6, (1, 32), (1e-6, 1.5e-6), streams_s=0.8e-6, level_s=0.05e-6)
    monkeypatch.setattr(loop, "read_plainly", lambda base, *given: calls.append(base is fast.base) or read_plainly(base, *given))
    for first in (True, False):
        drafting(fast, seen := [])
        expected, found = both(fast, prompt_ids(), max_new_tokens=100, do_sample=do_sample)
        assert torch.equal(expected, found)
        assert all(calls)
        assert len(calls) > 0.8 * len(seen)
        assert (sum(seen[:4]) == 4) == first  # tried four times at first, then once
        assert seen[0]
        calls.clear()


def test_costs_that_were_measured_on_a_busy_machine_are_measured_again_once(measured: list[CostCurve]) -> None:
    fast = attached()
    for again in (1, 0):
        fast.costs = CostCurve(9.0, (1, 32), (9.0, 9.5), streams_s=0.1, level_s=0.1)
        for _ in range(2):
            both(fast, prompt_ids(), max_new_tokens=60)
        assert len(measured) == 2
        assert (fast.costs == measured[-1]) == bool(again)


def test_seconds_are_told_by_what_they_went_into() -> None:
    fast = attached()
    both(fast, prompt_ids())
    stats = fast.stats
    assert 0 < stats.draft_s + stats.pass_s <= stats.decode_s
    assert min(stats.draft_s, stats.pass_s) > 0
    assert Stats().draft_s == 0
