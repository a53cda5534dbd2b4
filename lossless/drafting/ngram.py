"""Drafts from n-grams: what followed the last few tokens when they stood in the text before (prompt lookup).

Knows: which token followed each n-gram of one text, and how far such a draft can be trusted.
Does not know: streams, trees, or the base. No weights; a wrong draft costs a row of a pass, never a token.
"""

from __future__ import annotations

from collections.abc import Sequence

# How often the longest run found again was followed by the same token: (right, tried) for runs of 1, 2, 3, ...
# tokens, in greedy answers of a small chat model. A text starts from these and then goes by its own counts.
_EXPERIENCE = ((2, 12), (6, 12), (8, 12), (9, 12), (11, 12))


class NGramCache:
    """The n-grams of up to five tokens of one text, prompt and answer, and what came after them.

    Args:
        prompt: token ids; its n-grams count, but how far to trust them is learnt from the answer alone.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._follower: dict[tuple[int, ...], int] = {}
        self._tail: tuple[int, ...] = ()
        self._counts = list(_EXPERIENCE)
        for token in prompt:
            self._remember(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that were emitted: each tells whether the cache had it right, and is then added to it."""
        for token in tokens:
            if run := self._longest_known(self._tail):
                right, tried = self._counts[len(run) - 1]
                self._counts[len(run) - 1] = (right + (self._follower[run] == token), tried + 1)
            self._remember(token)

    def recall(self, path: Sequence[int]) -> tuple[int, float] | None:
        """What followed the text's end and `path` the last time, and the probability that it does again."""
        if run := self._longest_known((*self._tail, *path)):
            right, tried = self._counts[len(run) - 1]
            return self._follower[run], right / tried
        return None

    def _longest_known(self, tokens: tuple[int, ...]) -> tuple[int, ...] | None:
        for length in range(min(len(tokens), len(_EXPERIENCE)), 0, -1):
            if tokens[-length:] in self._follower:
                return tokens[-length:]
        return None

    def _remember(self, token: int) -> None:
        for length in range(1, len(self._tail) + 1):
            self._follower[self._tail[-length:]] = token
        self._tail = (*self._tail, token)[-len(_EXPERIENCE) :]
