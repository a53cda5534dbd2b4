"""The text's memory recalls what followed, the longest run first, and learns how far to trust itself."""

from __future__ import annotations

import math

import pytest

from lossless.drafting.ngram import NGramCache
from lossless.drafting.tree import blend


def test_recalls_what_followed_the_longest_run_last() -> None:
    ngrams = NGramCache([1, 2, 3, 9, 2, 4, 1, 2])
    assert ngrams.recall(())[0] == 3  # type: ignore[index]  # after 1 2, although 2 alone was last followed by 4
    assert ngrams.recall((3,))[0] == 9  # type: ignore[index]
    assert ngrams.recall((3, 9, 2))[0] == 4  # type: ignore[index]
    assert ngrams.recall((7,)) is None


def test_of_two_memories_the_later_one_counts() -> None:
    assert NGramCache([5, 6, 1, 5, 6, 2, 5, 6]).recall(())[0] == 2  # type: ignore[index]


def test_trust_follows_what_was_right() -> None:
    def trust(answer: list[int]) -> float:
        ngrams = NGramCache([1, 2, 3, 4, 5, 6, 7, 8])
        ngrams.extend(answer)
        recalled = ngrams.recall((1, 2, 3, 4, 5))
        assert recalled is not None
        assert recalled[0] == 6
        return recalled[1]

    repeats, breaks = [1, 2, 3, 4, 5, 6, 7, 8] * 6, [1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 6] * 6
    assert trust(breaks) < trust([]) < trust(repeats) < 1


def test_longer_runs_are_trusted_more() -> None:
    ngrams = NGramCache([1, 2, 3, 4, 5, 6, 7])
    trusts = [ngrams.recall(tuple(range(9, 9 + 1)) + tuple(range(6 - n, 6)))[1] for n in (1, 2, 3, 4, 5)]  # type: ignore[index]
    assert trusts == sorted(trusts)
    assert 0 < trusts[0] < trusts[-1] < 1


def test_an_empty_text_recalls_nothing() -> None:
    ngrams = NGramCache([])
    assert ngrams.recall(()) is None
    ngrams.extend([3])
    assert ngrams.recall(()) is None


def test_a_blend_is_a_mixture() -> None:
    drafted = {4: math.log(0.5), 5: math.log(0.25)}
    mixed = blend(drafted, (5, 0.2))
    assert {token: math.exp(score) for token, score in mixed.items()} == pytest.approx({4: 0.4, 5: 0.2 + 0.8 * 0.25})
    new = blend(drafted, (6, 0.2))
    assert math.exp(new[6]) == pytest.approx(0.2)
    assert blend(drafted, None) is drafted
    assert blend({}, (6, 0.9)) == {6: pytest.approx(math.log(0.9))}
