"""Whether drafts pay on this text: decided step by step from what they gave, and from what steps cost.

Knows: a cost curve, and how many tokens the last steps emitted. State of one call. Does not know: trees, or models. It decides
how fast tokens come, never which.
"""

from __future__ import annotations

from .costs import CostCurve

_WEIGHT = 0.2  # of the newest step in the running averages
_TRIALS = 4  # steps with drafts before they are judged: some at the start, some after each pause
_FIRST_PAUSE, _LAST_PAUSE = 4, 128  # plain steps before drafts are tried again; doubled each time


class DraftPolicy:
    """Drafts or plain steps, for one call.

    Args:
        curve: what steps cost; None: drafts always pay.
    """

    def __init__(self, curve: CostCurve | None) -> None:
        self.curve, self._near = curve, curve
        self._emitted = self._seconds = 0.0  # running sums over steps with drafts
        self._trials, self._pause, self._left = _TRIALS, _FIRST_PAUSE, 0

    @property
    def drafting(self) -> bool:
        """Whether streams run for the next step."""
        return self._left == 0

    def read(self, context: int) -> None:
        """So many tokens have been read: passes over more of them take longer."""
        if self._near is not None:
            self.curve = self._near.at(context)

    def note(self, rows: int, levels: int, emitted: float) -> None:
        """What a step gave: tokens a text from a pass of so many rows a text."""
        if self.curve is None:
            return
        if not self.drafting:
            self._left -= 1
            if self._left == 0:
                self._trials = _TRIALS // 2
                self._emitted = self._seconds = 0.0
            return
        self._emitted = (1 - _WEIGHT) * self._emitted + emitted
        self._seconds = (1 - _WEIGHT) * self._seconds + self.curve.verify_s(rows) + self.curve.draft_s(levels)
        self._trials = max(0, self._trials - 1)
        if self._trials:
            return
        if self._emitted * self.curve.verify_s(1) < self._seconds:
            self._left, self._pause = self._pause, min(_LAST_PAUSE, 2 * self._pause)
        else:
            self._pause = _FIRST_PAUSE
