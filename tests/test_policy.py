"""Whether drafts pay on a text: simulated texts, against always drafting and never."""

from __future__ import annotations

import random
from statistics import mean

import pytest

from lossless.drafting.costs import CostCurve
from lossless.drafting.policy import FIRST_PAUSE, DraftPolicy

CURVE = CostCurve(1.0, (1, 2, 32), (1.0, 1.05, 2.0), streams_s=0.4, level_s=0.02)  # a step over 4 rows and 3 levels pays from 1.57 tokens on
ROWS, LEVELS = 4, 3


def speed(
    tokens_per_step: float, texts: int = 200, length: int = 128, drafted: float = 1.0, plain: float = 1.0, disturbed: float = 0.0,
    recalled: float = 1.0, after: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Of a policy over texts whose drafts emit so many tokens a step, at most 6, and of always drafting; against plain steps.

    drafted, plain: how much longer steps take than the curve says; disturbed: the part of all steps that take thrice as long; recalled: tokens that
    a plain step emits, from a pass of as many rows as one with drafts if it is above 1; after: each text comes after the one before.
    """
    found: tuple[list[float], list[float]] = ([], [])
    rows = ROWS if recalled > 1 else 1
    drafted_s, plain_s = drafted * (CURVE.verify_s(ROWS) + CURVE.draft_s(LEVELS)), plain * CURVE.verify_s(rows)
    pause = FIRST_PAUSE
    for seed in range(texts):
        for always, ratios in enumerate(found):
            dice, clock = random.Random(seed), random.Random(f"clock {seed}")
            policy, tokens, seconds = DraftPolicy(CURVE, pause), 0, 0.0
            while tokens < length:
                emitted, drafting = 1, policy.drafting or bool(always)
                while emitted < 6 and dice.random() > 1 / (tokens_per_step if drafting else recalled):
                    emitted += 1
                seconds += (drafted_s if drafting else plain_s) * (3 if clock.random() < disturbed else 1)
                policy.note(ROWS if drafting else rows, LEVELS, emitted, seconds)
                tokens += emitted
            ratios.append(tokens / seconds * plain_s / recalled * (1 + 2 * disturbed))
            pause = policy.pause if after and not always else pause
    return mean(found[0]), mean(found[1])


@pytest.mark.parametrize("tokens_per_step", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
def test_where_drafts_do_not_pay_little_is_lost(tokens_per_step: float) -> None:
    ours, always = speed(tokens_per_step)
    assert ours > 0.96
    assert ours > always


@pytest.mark.parametrize("tokens_per_step", [2.2, 2.5, 3.0])
def test_where_they_pay_they_are_not_given_up(tokens_per_step: float) -> None:
    ours, always = speed(tokens_per_step)
    assert ours > 0.97 * always > 1


@pytest.mark.parametrize("tokens_per_step", [1.0, 1.2, 1.4])
def test_after_a_text_on_which_drafts_did_not_pay_less_is_lost(tokens_per_step: float) -> None:
    ours, _ = speed(tokens_per_step, after=True)
    assert ours > 0.98 > speed(tokens_per_step)[0]


@pytest.mark.parametrize("tokens_per_step", [2.2, 2.5, 3.0])
def test_what_texts_before_said_does_not_stand_in_the_way_of_drafts_that_pay(tokens_per_step: float) -> None:
    ours, always = speed(tokens_per_step, after=True)
    assert ours > 0.96 * always > 1


def test_drafts_are_held_against_what_the_text_recalls_by_itself() -> None:
    ours, always = speed(1.4, length=512, recalled=1.8)  # against one token a step they would seem to pay now and then
    assert always < 0.65
    assert ours > 0.93


@pytest.mark.parametrize(("emitted", "least", "recalls"), [(1.0, 0.96, 0.1), (1.5, 0.96, 0.25), (1.9, 1.1, 1.0), (4.0, 2.4, 1.0)])
def test_what_the_text_recalls_is_left_out_where_it_does_not_pay(emitted: float, least: float, recalls: float) -> None:
    """Drafts give nothing, and n-grams would draft for every step, of as many tokens."""
    policy, rows, tokens, seconds, seen = DraftPolicy(CURVE, 64), 20, 0.0, 0.0, []
    while tokens < 256:
        gives = emitted if policy.recalling and not policy.drafting else 1.0
        took = CURVE.verify_s(rows if policy.recalling else 1) + (CURVE.draft_s(LEVELS) if policy.drafting else 0.0)
        tokens, seconds = tokens + gives, seconds + took
        seen.append(policy.recalling)
        policy.note(rows if policy.recalling else 1, LEVELS, gives, seconds)
    assert tokens / seconds > least
    assert sum(seen) <= recalls * len(seen)


def test_what_the_text_recalls_is_tried_again_within_a_pause() -> None:
    """It gives nothing at first, and then much, as where an answer begins to repeat itself."""
    policy, rows, seconds, seen = DraftPolicy(CURVE, 128), 20, 0.0, []
    for step in range(129):  # one with drafts, and the pause behind it
        seconds += CURVE.verify_s(rows if policy.recalling else 1) + (CURVE.draft_s(LEVELS) if policy.drafting else 0.0)
        seen.append(policy.recalling)
        policy.note(rows if policy.recalling else 1, LEVELS, 4.0 if policy.recalling and step > 32 else 1.0, seconds)
    assert policy.drafting
    assert sum(seen[1:33]) <= 2
    assert sum(seen[65:]) == 64


def test_a_curve_that_is_wrong_is_found_out() -> None:
    ours, always = speed(1.8, drafted=1.5)  # by the curve drafts pay, by the clock they do not
    assert always < 0.85
    assert ours > 0.93
    ours, always = speed(1.8, plain=1.5)  # plain steps are slower than the curve has them
    assert always > 1.5
    assert ours > 0.95 * always


def test_a_busy_machine_is_not_held_against_drafts() -> None:
    ours, always = speed(2.2, drafted=2.0, plain=2.0)
    assert ours > 0.93 * always > 1


def test_single_steps_that_are_disturbed_are_not_held_against_drafts() -> None:
    ours, always = speed(2.2, disturbed=0.3)
    assert ours > 0.95 * always


@pytest.mark.parametrize(("took", "stale"), [(0.3, True), (0.9, False), (3.0, False)])
@pytest.mark.parametrize("tokens_per_step", [1.0, 3.0])  # plain steps, or drafts
def test_a_curve_that_was_measured_on_a_busy_machine_is_stale(took: float, stale: bool, tokens_per_step: float) -> None:
    policy, seconds = DraftPolicy(CURVE), 0.0
    assert not policy.stale
    for step in range(30):
        seconds += took * (CURVE.verify_s(ROWS) + CURVE.draft_s(LEVELS) if policy.drafting else CURVE.verify_s(1)) * (2 if step % 4 == 0 else 1)
        policy.note(ROWS, LEVELS, tokens_per_step, seconds)
    assert policy.stale == stale
