"""Trees hold the likeliest paths, and as many of them as pay under a cost curve."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lossless.drafting.builder import TreeBuilder, best_size, plant
from lossless.drafting.costs import CostCurve
from lossless.drafting.policy import DraftPolicy
from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError


def curve(row_s: float, streams_s: float = 0.1, level_s: float = 0.01) -> CostCurve:
    """Passes of one second and so much for each further row."""
    return CostCurve(1.0, (1, 2, 32), (1.0, 1.0 + row_s, 1.0 + 31 * row_s), streams_s, level_s)


def test_plant_takes_paths_with_their_parents_depth_first_and_the_likeliest_child_first() -> None:
    tokens, parents = [10, 11, 12, 13, 14, 15], [-1, -1, 0, 0, 2, 1]
    tree = plant(9, tokens, parents, [0, 2, 4, 1, 3])
    assert tree == DraftTree((9, 10, 12, 14, 13, 11), (-1, 0, 1, 2, 1, 0))
    assert plant(9, tokens, parents, []) == DraftTree((9,), (-1,))


def grown(max_nodes: int, costs: CostCurve | None, seed: int = 0, levels: int = 3) -> tuple[TreeBuilder, list[list[dict[int, float]]]]:
    """A builder that has grown, and what each level was given."""
    generator = torch.Generator().manual_seed(seed)
    builder, given = TreeBuilder(max_nodes, None, 99, costs), []
    for _ in range(levels):
        if not builder.worth_a_level():
            break
        drafted = [
            dict(enumerate((torch.randn(6, generator=generator) * 2).log_softmax(0).tolist())) for _ in builder.frontier
        ]
        given.append(drafted)
        builder.levels += 1
        builder.grow(drafted)
    return builder, given


def scores(builder: TreeBuilder, tree: DraftTree) -> list[float]:
    """The probability of each drafted node of a tree."""
    known = {}
    for candidate, (token, parent) in enumerate(zip(builder.tokens, builder.parents, strict=True)):
        known[(*(known_path(builder, parent)), token)] = math.exp(builder.scores[candidate])
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return [known[path[1:]] for path in found[1:]]


def known_path(builder: TreeBuilder, candidate: int) -> tuple[int, ...]:
    return () if candidate == -1 else (*known_path(builder, builder.parents[candidate]), builder.tokens[candidate])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("row_s", [0.001, 0.03, 0.2, 2.0])
def test_no_other_tree_of_its_candidates_emits_more_a_second(row_s: float, seed: int) -> None:
    """Against brute force: every subset of a few candidates that holds the parents of its members."""
    costs = curve(row_s)
    builder, _ = grown(6, costs, seed, levels=2)
    tree = builder.finish(7)

    def rate(probabilities: list[float]) -> float:
        return (1 + sum(probabilities)) / (costs.draft_s(builder.levels) + costs.verify_s(len(probabilities) + 1))

    best = sorted(range(len(builder.scores)), key=lambda i: -builder.scores[i])[:9]
    rates = [
        rate([math.exp(builder.scores[i]) for i in some])
        for count in range(6)
        for some in itertools.combinations(best, count)
        if all(builder.parents[i] in (-1, *some) for i in some)
    ]
    assert rate(scores(builder, tree)) == pytest.approx(max(rates))


def test_dear_rows_make_small_trees_and_free_ones_full() -> None:
    sizes = [len(grown(20, curve(row_s))[0].finish(7)) for row_s in (1e-6, 0.01, 0.1, 0.5, 5.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (20, 1)
    assert len(grown(20, None)[0].finish(7)) == 20


def test_a_tree_stops_before_a_cliff() -> None:
    cliff = CostCurve(1.0, (1, 4, 5, 32), (1.0, 1.0001, 3.0, 3.001), 0.1, 0.01)
    assert best_size([0.5, 0.4, 0.3, 0.2, 0.1], cliff, 0.1) == 3
    assert best_size([0.9] * 31, cliff, 0.1) == 31  # worth it, if there is enough behind it


def test_levels_that_cost_more_than_they_can_give_are_not_grown() -> None:
    assert len(grown(20, curve(0.01, level_s=0.01))[1]) == 3
    assert len(grown(20, curve(0.01, level_s=5.0))[1]) == 1


def test_nor_are_those_whose_rows_would_cost_more() -> None:
    dear = curve(0.55, level_s=0.1)
    for probability, worth in ((0.6, False), (0.7, True)):  # a row costs what 0.55 tokens are worth, and a level 0.1
        builder = TreeBuilder(8, None, 9, dear)
        builder.levels = 1
        builder.grow([{1: math.log(probability), 2: math.log(0.3)}])
        assert builder.worth_a_level() == worth


def test_a_text_that_ends_soon_gets_no_deeper_tree() -> None:
    builder = TreeBuilder(8, None, 1, None)
    builder.grow([{1: -0.1, 2: -3.0}])
    assert builder.grow([{3: -0.1}, {4: -0.1}]) == []
    assert max(builder.finish(0).depths) == 1


def test_a_curve_is_read_between_its_points() -> None:
    found = CostCurve(1.0, (1, 4, 8), (1.0, 1.3, 2.1), 0.5, 0.25)
    assert [found.verify_s(n) for n in (1, 2, 4, 6, 8, 9)] == pytest.approx([1.0, 1.1, 1.3, 1.7, 2.1, 2.3])
    assert (found.draft_s(0), found.draft_s(2)) == (0.0, 1.0)
    assert CostCurve.from_dict(found.to_dict()) == found


def test_a_longer_text_makes_rows_dearer() -> None:
    found = CostCurve(1.0, (1, 4, 8), (1.0, 1.3, 2.1), 0.5, 0.25, context=100, pass_key_s=0.01, row_key_s=0.001)
    assert found.at(50) == found.at(100) == found
    far = found.at(200)
    assert far.pass_s == pytest.approx((1.0 + 1.1, 1.3 + 1.4, 2.1 + 1.8))
    assert far.plain_s == pytest.approx(2.1)
    policy = DraftPolicy(found)
    policy.read(200)
    assert policy.curve == far
    policy.read(300)
    assert policy.curve == found.at(300)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"row_key_s": -1.0}, "must be at least 0, got 0.0 and -1.0"),
        ({"rows": (2, 4, 8)}, "rows must rise from 1, got"),
        ({"rows": (1, 8, 4)}, "rows must rise from 1, got"),
        ({"rows": (1, 2)}, "pass_s must have a time for each of 2"),
        ({"level_s": 0.0}, "every time must be above 0"),
    ],
)
def test_a_curve_that_is_none_is_refused(changes: dict[str, object], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        CostCurve(**{"plain_s": 1.0, "rows": (1, 4, 8), "pass_s": (1.0, 1.3, 2.1), "streams_s": 0.5, "level_s": 0.25, **changes})


def test_drafts_that_give_nothing_are_left_out_for_longer_and_longer() -> None:
    costs, drafted, spent = curve(0.01, streams_s=0.5), [], 0.0
    policy = DraftPolicy(costs)
    for _ in range(600):
        drafted.append(policy.drafting)
        rows, levels = (2, 3) if policy.drafting else (1, 0)
        spent += costs.verify_s(rows) + costs.draft_s(levels)
        policy.note(rows, levels, 1.0, spent)
    assert drafted[:4] == [True] * 4
    assert sum(drafted) <= 16
    pauses = [len(list(run)) for on, run in itertools.groupby(drafted) if not on]
    assert pauses[:-1] == sorted(pauses[:-1])
    assert max(pauses) <= 128


def test_drafts_that_pay_go_on_and_are_tried_again_when_they_may() -> None:
    costs, spent = curve(0.01, streams_s=0.5), 0.0
    policy = DraftPolicy(costs)

    def steps(count: int, emitted: float) -> None:
        nonlocal spent
        for _ in range(count):
            rows, levels, tokens = (8, 3, emitted) if policy.drafting else (1, 0, 1.0)
            spent += costs.verify_s(rows) + costs.draft_s(levels)
            policy.note(rows, levels, tokens, spent)

    steps(50, 3.0)
    assert policy.drafting
    for _ in range(30):
        if policy.drafting:
            steps(1, 1.0)
    assert not policy.drafting
    steps(400, 3.0)
    assert policy.drafting
    assert DraftPolicy(None).drafting
