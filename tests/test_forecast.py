"""The forecast is what steps that are played come to, and its bounds are not crossed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lossless.drafting.costs import CostCurve
from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError
from lossless.evaluation.forecast import (
    ACCEPTANCE_RATES,
    DRAFT_COSTS,
    Forecast,
    best,
    draw,
    expected_length,
    simulate,
    table,
)

CURVE = CostCurve(0.1, (1, 2, 4, 8, 16), (0.1, 0.11, 0.13, 0.17, 0.25), streams_s=0.02, level_s=0.005)
FREE = 1e-12  # seconds: no time may be 0


def linear(row_s: float, streams_s: float = FREE, level_s: float = FREE) -> CostCurve:
    """Passes of 1 second and `row_s` more for each further row, measured up to 256 rows."""
    rows = (1, 2, 256)
    return CostCurve(1.0, rows, tuple(1 + row_s * (n - 1) for n in rows), streams_s, level_s)


def random_curve(generator: np.random.Generator) -> CostCurve:
    """Costs in no order: passes of more rows may be the cheaper ones."""
    rows = (1, 2, 3, 5, 8, 12)
    return CostCurve(1.0, rows, tuple(generator.uniform(0.8, 3, len(rows))), *generator.uniform(0.01, 0.5, 2))


def test_expected_length_adds_up_what_is_reached() -> None:
    assert expected_length([]) == 1
    assert expected_length([0.5, 0.4, 0.1]) == pytest.approx(1 + 0.5 + 0.2 + 0.02)
    assert expected_length([0.7] * 6) == pytest.approx((1 - 0.7**7) / (1 - 0.7))
    assert expected_length([1.0] * 6) == 7


@pytest.mark.parametrize("acceptance", [[0.8] * 5, [0.9, 0.6, 0.3], [0.3], [0.99] * 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_that_are_played_have_the_expected_length(acceptance: list[float], seed: int) -> None:
    found = simulate(acceptance, step_s=0.2, steps=20_000, seed=seed)
    assert 0 < found.standard_error < 0.05
    assert abs(found.acceptance_length - expected_length(acceptance)) < 4 * found.standard_error
    assert abs(found.acceptance_length - expected_length(acceptance[:-1])) > 4 * found.standard_error
    assert found.seconds == pytest.approx(20_000 * 0.2)


def test_a_simulation_repeats_and_knows_when_nothing_is_left_to_chance() -> None:
    first, again, other = (simulate([0.9] * 9, 1.0, 1000, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert (certain := simulate([1.0, 1.0], 1.0, 10)).acceptance_length == 3
    assert certain.standard_error == 0
    assert simulate([], 1.0, 10).acceptance_length == 1


def test_a_trees_acceptance_is_the_mass_of_its_siblings() -> None:
    """A target that chooses among three tokens, walked down a tree of the two likelier at each of three depths."""
    parents = [-1] + [node // 2 for node in range(14)]
    tree = DraftTree(tuple([9] + [node % 2 for node in range(14)]), tuple(parents))
    choices = np.random.default_rng(0).choice(3, size=(5_000, 3), p=[0.5, 0.3, 0.2])
    emitted = []
    for chosen in choices.tolist():
        node, depth = 0, 0
        while depth < 3 and (child := tree.child(node, chosen[depth])) is not None:
            node, depth = child, depth + 1
        emitted.append(depth + 1)
    error = np.std(emitted, ddof=1) / math.sqrt(len(emitted))
    assert abs(np.mean(emitted) - expected_length([0.8] * 3)) < 4 * error


def test_rates_that_differ_between_steps_are_longer_than_their_mean() -> None:
    played = [simulate([rate] * 5, 1.0, 20_000) for rate in (0.5, 0.9)]
    mean = sum(p.acceptance_length for p in played) / 2
    assert mean - expected_length([0.7] * 5) > 4 * max(p.standard_error for p in played)


@pytest.mark.parametrize("draft_cost", [None, 0.0, 0.1])
@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_the_best_speedup_is_that_of_steps_that_are_played(rate: float, draft_cost: float | None) -> None:
    found = best(CURVE, rate, draft_cost=draft_cost)
    drafting = 0.02 + 0.005 * found.depth if draft_cost is None else draft_cost * 0.1 * found.depth
    steps = 40_000
    played = simulate([rate] * found.depth, CURVE.verify_s(found.depth + 1) + drafting, steps)
    plain_s = 0.1 * steps  # of as many tokens as steps
    assert found.depth > 0
    assert found.rows == found.depth + 1
    scale = plain_s / played.seconds
    assert abs(found.speedup - played.acceptance_length * scale) < 4 * played.standard_error * scale


def test_no_other_depth_is_faster_when_played() -> None:
    found = best(CURVE, 0.7)
    for depth in set(range(1, 16)) - {found.depth}:
        played = simulate([0.7] * depth, CURVE.verify_s(depth + 1) + CURVE.draft_s(depth), 20_000, seed=depth)
        scale = 0.1 * 20_000 / played.seconds
        assert (played.acceptance_length - 4 * played.standard_error) * scale <= found.speedup


def test_the_limit_is_not_crossed_by_any_acceptance() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        curve, depth = random_curve(generator), int(generator.integers(1, 12))
        forecast = Forecast(curve, depth)
        limit = forecast.limit().speedup
        for rows in range(1, 13):
            deepest = min(depth, rows - 1)
            length = simulate(generator.uniform(0, 1, deepest).tolist(), 1.0, 100).acceptance_length
            assert length * curve.plain_s / (curve.verify_s(rows) + curve.draft_s(deepest)) <= limit
        costs = {(n, d): curve.verify_s(n) + curve.draft_s(d) for d in range(depth + 1) for n in range(d + 1, 13)}
        assert limit == pytest.approx(max((d + 1) / seconds for (_, d), seconds in costs.items()))


def test_a_pass_with_rows_to_spare_is_taken_where_it_is_cheaper() -> None:
    curve = CostCurve(1.0, (1, 2, 4), (1.0, 2.0, 1.2), 0.1, 0.1)
    assert best(curve, 1.0, deepest=1) == best(curve, 1.0, deepest=1, draft_cost=0.2)
    assert (found := best(curve, 1.0, deepest=1)).rows == 4
    assert found.speedup == pytest.approx(2 / 1.4)


@pytest.mark.parametrize(
    ("rate", "row_s", "level_s"), [(0.9, 0.02, 0.01), (0.8, 0.1, FREE), (0.6, 0.01, 0.05), (0.95, FREE, 0.01)]
)
def test_the_best_depth_is_finite_and_lies_between_its_bounds(rate: float, row_s: float, level_s: float) -> None:
    found = best(linear(row_s, 0.2, level_s), rate)
    start, step = 1.2, row_s + level_s
    assert 1 < found.depth < 255
    assert rate ** (found.depth + 1) <= step * found.speedup <= rate**found.depth
    assert found.speedup <= min(1 / (start * (1 - rate)), 1 / step)


def test_free_rows_and_levels_approach_the_limit_of_memory() -> None:
    for rate in (0.5, 0.9):
        assert best(linear(FREE), rate).speedup == pytest.approx(1 / (1 - rate), rel=1e-6)
        assert best(linear(FREE, streams_s=0.25), rate).speedup == pytest.approx(1 / (1 - rate) / 1.25, rel=1e-6)


@pytest.mark.parametrize("draft_cost", [None, 0.0])
def test_rows_that_cost_a_token_each_gain_nothing(draft_cost: float | None) -> None:
    for rate in (0.5, 0.99):
        assert best(linear(1.0), rate, draft_cost=draft_cost).depth == 0
    assert best(linear(1.0), 1.0, draft_cost=draft_cost).speedup <= 1


def test_a_draft_model_pays_from_its_bound_on_and_gains_no_more_than_its_cost_allows() -> None:
    bar = 0.2 + 0.05  # its pass and a further row
    assert best(linear(0.05), bar - 0.01, draft_cost=0.2).depth == 0
    assert best(linear(0.05), bar + 0.01, draft_cost=0.2).depth > 0
    for cost in DRAFT_COSTS:
        for rate in (*ACCEPTANCE_RATES, 0.999):
            assert best(linear(FREE), rate, draft_cost=cost).speedup <= min(1 / (1 - rate), 1 / cost)


def test_streams_tie_with_a_draft_model_of_the_tied_cost() -> None:
    curve = linear(FREE, streams_s=0.2, level_s=0.01)
    tied = Forecast(curve, 10).tied_draft_cost()
    assert tied == pytest.approx(0.01 + 0.2 / 10)
    streams = best(curve, 1.0, deepest=10)
    assert streams.depth == 10
    assert best(curve, 1.0, 10, draft_cost=tied).speedup == pytest.approx(streams.speedup)
    assert best(curve, 1.0, 10, draft_cost=1.01 * tied).speedup < streams.speedup
    assert best(curve, 1.0, 10, draft_cost=0.99 * tied).speedup > streams.speedup


def test_speedups_of_a_forecast_are_those_of_the_curve() -> None:
    forecast = Forecast(CURVE, 5)
    assert forecast.lengths == (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6)
    assert Forecast(CURVE, 1).lengths == (1, 1.5, 2)
    assert [forecast.longest(rows) for rows in CURVE.rows] == [1, 2, 4, 6, 6]
    assert forecast.break_even(1) == pytest.approx(1)  # nothing is drafted for it
    assert forecast.break_even(4) == pytest.approx((0.13 + 0.02 + 3 * 0.005) / 0.1)
    assert forecast.break_even(16) == pytest.approx((0.25 + 0.02 + 5 * 0.005) / 0.1)
    assert forecast.speedup(forecast.break_even(16), 16) == pytest.approx(1)
    assert forecast.speedup(3.0, 4) == pytest.approx(3 * 0.1 / 0.165)
    assert forecast.speedup(4.0, 4) is not None
    assert forecast.speedup(4.5, 4) is None
    assert forecast.limit().rows == 6
    assert forecast.limit().speedup == pytest.approx(6 * 0.1 / (0.15 + 0.045))


def test_a_forecast_is_written_as_json_and_as_a_table() -> None:
    forecast = Forecast(CURVE, 5)
    found = json.loads(json.dumps(forecast.to_dict()))
    assert CostCurve.from_dict(found["curve"]) == CURVE
    by_length = {entry["acceptance_length"]: entry["speedup"] for entry in found["by_length"]}
    assert by_length[3.0] == [None, None, *(forecast.speedup(3.0, rows) for rows in (4, 8, 16))]
    by_rate = {entry["acceptance"]: entry for entry in found["by_rate"]}
    assert by_rate[0.7]["streams"]["depth"] == best(CURVE, 0.7).depth
    models = [best(CURVE, 0.7, draft_cost=c) for c in DRAFT_COSTS]
    assert [model["speedup"] for model in by_rate[0.7]["draft_model"]] == [model.speedup for model in models]

    lines = [line.split() for line in table(forecast).splitlines()]
    assert ["3.0", "-", "-", "1.82", "1.40", "1.02"] in lines
    assert ["break-even", "length", "1.00", "1.35", "1.65", "2.15", "2.95"] in lines
    assert ["speedup", "at", "most", "1.00", "1.48", "2.42", "2.79", "2.03"] in lines
    streams = best(CURVE, 0.7)
    (row,) = (line for line in lines if line[:1] == ["0.7"])
    assert row[:4] == ["0.7", f"{streams.acceptance_length:.2f}", str(streams.depth), f"{streams.speedup:.2f}"]
    assert len(row) == 4 + 2 * len(DRAFT_COSTS)
    flat = Forecast(CostCurve(1.0, (1, 4), (1.0, 1.01), 0.01, 0.001), 3)
    assert ["0.9", "3.44", "3+"] in [line.split()[:3] for line in table(flat).splitlines()]


def test_the_picture_is_a_png_of_its_forecast(tmp_path: Path) -> None:
    paths = [tmp_path / "deep", tmp_path / "shallow"]
    for path, depth in zip(paths, (5, 2), strict=True):
        draw(Forecast(CURVE, depth), path)
    pictures = [path.read_bytes() for path in paths]
    assert all(picture.startswith(b"\x89PNG\r\n") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_what_cannot_be_forecast_is_refused() -> None:
    with pytest.raises(UsageError, match="depth must be at least 1, got 0"):
        Forecast(CURVE, 0)
    with pytest.raises(UsageError, match=r"depth must be at most 15, .* got 16"):
        Forecast(CURVE, 16)
    with pytest.raises(UsageError, match=r"acceptance_length must be at least 1, got 0\.5"):
        Forecast(CURVE, 3).speedup(0.5, 4)
    with pytest.raises(UsageError, match=r"deepest must be from 0 to 15, .* got 16"):
        best(CURVE, 0.5, deepest=16)
    with pytest.raises(UsageError, match=r"draft_cost must be at least 0 and finite, got -0\.1"):
        best(CURVE, 0.5, draft_cost=-0.1)
    with pytest.raises(UsageError, match=r"step_s must be above 0, got 0\.0"):
        simulate([0.5], 0.0, 10)
    with pytest.raises(UsageError, match="steps must be at least 2, got 1"):
        simulate([0.5], 1.0, 1)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match=f"acceptance must be from 0 to 1, got {rate}"):
            expected_length([0.5, rate])
        with pytest.raises(UsageError, match="acceptance must be from 0 to 1"):
            simulate([rate], 1.0, 10)
        with pytest.raises(UsageError, match="acceptance must be from 0 to 1"):
            best(CURVE, rate, deepest=0)
