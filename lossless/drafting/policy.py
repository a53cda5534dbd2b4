"""Whether drafts pay on this text: decided step by step from what they gave, and from what steps took.

Knows: a cost curve, how many tokens the last steps emitted, how long they took, and whether drafts paid on the text before. State of one
call. Does not know: trees, or models. It decides how fast tokens come, never which.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from .costs import CostCurve

# Simulated over texts of 128 tokens whose drafts emit 1.02 to 2.8 tokens a step, where 1.3 or 1.6 pay: at worst 0.97 of the plain
# speed, and from 2.2 tokens on at most 3 % below drafts that are never left out.
_WEIGHT = 0.1  # of the newest step in the running averages, which go on over pauses: one lucky step is no proof
_TRIALS = 4  # steps with drafts before they are judged for the first time; one is enough after a pause, and where drafts did not pay on the text before
FIRST_PAUSE, _LAST_PAUSE = 16, 128  # plain steps before drafts are tried again; doubled where they do not pay, halved where they do
_CLEARLY, _AGAIN = 0.85, 0.9  # drafts are left out where they give less than this part of what plain steps would: at first, and once they have been
_LOSS = 0.5  # plain steps that what the text recalls may lose in a pause before it is left out, too
_FORGIVEN = 1 / 64  # of such a loss at each plain step, in plain steps: so it is tried again
_LAST = 8  # steps of which the quickest tells how slow the machine is: other work on it only ever adds to a step, and rarely to all
_APART = 32  # tokens of context that change no cost by much
_STALE = 0.6  # of the time by the curve: steps that take less say that it was measured beside other work


class DraftPolicy:
    """Drafts or plain steps, for one call.

    Args:
        curve: what steps cost; None: drafts always pay.
        pause: plain steps before drafts are tried again, as the text before left them.
    """

    def __init__(self, curve: CostCurve | None, pause: int = FIRST_PAUSE) -> None:
        self.curve, self._near, self._read = curve, curve, -_APART
        self._emitted = self._expected = 0.0  # running sums over steps with drafts: tokens, and their time by the curve
        self._plain_emitted = self._plain_expected = 0.0  # the same of steps without, in which n-grams may draft all the same
        self._slower: deque[float] = deque(maxlen=_LAST)  # how many times as long as by the curve the last steps with drafts took
        self._plain_slower: deque[float] = deque(maxlen=_LAST)  # the same of plain steps
        self._saved = 0.0  # plain steps, by what the text recalled in this pause
        self._spent = 0.0
        self.pause, self._left = pause, 0
        self._trials = _TRIALS if pause == FIRST_PAUSE else 1

    @property
    def drafting(self) -> bool:
        """Whether streams run for the next step."""
        return self._left == 0

    @property
    def resting(self) -> bool:
        """Whether none will for the step behind that, either."""
        return self._left > 1

    @property
    def recalling(self) -> bool:
        """Whether n-grams draft for the next step."""
        return self.drafting or self._saved > -_LOSS

    @property
    def stale(self) -> bool:
        """Whether the curve is to be measured again: by it, most of the last steps would have taken much longer."""
        steps = [*self._slower, *self._plain_slower]
        return len(steps) >= _TRIALS and median(steps) < _STALE

    def read(self, context: int) -> None:
        """So many tokens have been read: passes over more of them take longer."""
        if self._near is not None and context >= self._read + _APART:
            self.curve, self._read = self._near.at(context), context

    def note(self, rows: int, levels: int, emitted: float, spent_s: float) -> None:
        """What a step gave: tokens a text from a pass of so many rows a text.

        spent_s: what drafts and passes of this call took so far.
        """
        if self.curve is None:
            return
        took, self._spent = spent_s - self._spent, spent_s
        if not self.drafting:  # rows of such a step are those that the text recalls
            expected = self.curve.verify_s(rows)
            self._plain_slower.append(took / expected)
            self._plain_emitted = (1 - _WEIGHT) * self._plain_emitted + max(1.0, emitted)  # a choice too close to call comes behind it
            self._plain_expected = (1 - _WEIGHT) * self._plain_expected + expected
            self._saved += max(1.0, emitted) - expected / self.curve.verify_s(1)
            self._saved = max(self._saved, min(0.0, self._saved + _FORGIVEN))
            self._left -= 1
            return
        expected = self.curve.verify_s(rows) + self.curve.draft_s(levels)
        if self._trials < _TRIALS:  # the streams of the first step ran before the clock did
            self._slower.append(took / expected)
        self._emitted = (1 - _WEIGHT) * self._emitted + emitted
        self._expected = (1 - _WEIGHT) * self._expected + expected
        self._trials = max(0, self._trials - 1)
        if self._trials:
            return
        least = _CLEARLY if self.pause == FIRST_PAUSE else _AGAIN
        if self._emitted * self._plain_s(self.curve) < least * min(self._slower) * self._expected:
            self._left, self.pause, self._saved = self.pause, min(_LAST_PAUSE, 2 * self.pause), 0.0
        else:
            self.pause = max(FIRST_PAUSE, self.pause // 2)

    def _plain_s(self, curve: CostCurve) -> float:
        """What a token takes without drafts: the curve, corrected by plain steps that were seen, and by what they recalled. Before any
        were, it is taken to hold, or to be too high by as much as it was for steps with drafts."""
        if not self._plain_slower:
            return min(1.0, min(self._slower)) * min(curve.verify_s(1), curve.plain_s)
        return min(self._plain_slower) * min(self._plain_expected / self._plain_emitted, curve.plain_s)
