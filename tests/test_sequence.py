"""The base's own choice of a token is that of torch, found in another way."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from lossless.drafting.noise import NoiseTape
from lossless.generation.sequence import Sequence, at_least, largest, what_may_end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("odd", [[], [float("nan")], [float("inf")], [float("-inf"), float("nan"), float("inf")]], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 33, 49153])
def test_the_largest_is_the_first_of_equals_as_in_torch(vocab: int, odd: list[float], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for spread in (1, 3, 10**6):
        row = torch.randint(-spread, spread, (vocab,), generator=generator).to(dtype)
        row[torch.randint(vocab, (len(odd),), generator=generator)] = torch.tensor(odd, dtype=dtype)
        assert largest(row) == int(row.argmax())
        assert at_least(row, 0.0) == int((row >= 0).sum())


def test_where_nothing_is_larger_than_anything_the_first_is_chosen() -> None:
    for number in (float("-inf"), float("nan"), 0.0):
        row = torch.full((100,), number)
        assert largest(row) == int(row.argmax()) == 0


def test_criteria_are_asked_wherever_they_may_end_a_text_or_warn() -> None:
    length, tokens = MaxLengthCriteria(40, max_position_embeddings=30), EosTokenCriteria([2, 7])
    assert what_may_end(StoppingCriteriaList([length, tokens])) == (31, {2, 7})
    assert what_may_end(StoppingCriteriaList([MaxLengthCriteria(20, max_position_embeddings=30), EosTokenCriteria(3)])) == (20, {3})
    assert what_may_end(StoppingCriteriaList([MaxLengthCriteria(20)])) == (20, set())
    assert what_may_end(StoppingCriteriaList()) == (math.inf, set())
    for others in (MaxTimeCriteria(9.0), type("Own", (MaxLengthCriteria,), {})(50)):
        assert what_may_end(StoppingCriteriaList([length, tokens, others]))[0] == 0


class Alike(TopKLogitsWarper):
    """The same, of which nothing is known."""


def test_where_top_k_cuts_clearly_that_is_seen_at_once_and_nothing_else_is() -> None:
    """With a warper whose ways are known a choice is open in the very cases in which it is with one whose ways are tried out."""
    open_ones = 0
    for seed in range(400):
        answers = []
        for warper in (TopKLogitsWarper, Alike):
            torch.manual_seed(seed)
            processors = LogitsProcessorList([TemperatureLogitsWarper(0.8), warper(6)])
            config = GenerationConfig(do_sample=True, max_length=9, temperature=0.8)
            text = Sequence(0, torch.tensor([[1, 2]]), 0, 0, processors, StoppingCriteriaList(), config, NoiseTape(1), None, guard=0.2)
            answers.append(text.choose(torch.randn(40), alone=False))
        assert answers[0] == answers[1]
        open_ones += answers[0] is None
    assert 40 < open_ones < 360
