"""What the parts of a step cost on this machine, by the rows of a pass.

Knows: seconds, and how to read between measured points. Pure: no model, no clock. Does not know: how they were measured
(generation/measure.py), or what tree is drawn from them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from ..errors import UsageError, require_types


@dataclass(frozen=True)
class CostCurve:
    """Seconds, each the least of some runs.

    Attributes:
        plain_s: one token of the base's own loop (a pass of one row, the choice, the loop around it).
        rows: numbers of rows that were measured, rising, the first of them 1.
        pass_s: a verification pass of so many rows, and what the loop does around it.
        streams_s: running the streams of one node.
        level_s: growing one level of a tree.
        context: tokens behind which passes were measured.
        pass_key_s, row_key_s: what each further token of context adds to a pass, and to each row of it.

    Raises:
        UsageError: no points, rows that do not rise from 1, or a time that is not above 0.
    """

    plain_s: float
    rows: tuple[int, ...]
    pass_s: tuple[float, ...]
    streams_s: float
    level_s: float
    context: int = 0
    pass_key_s: float = 0.0
    row_key_s: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        if not self.rows or self.rows[0] != 1 or list(self.rows) != sorted(set(self.rows)):
            raise UsageError(f"rows must rise from 1, got {self.rows}")
        if len(self.rows) != len(self.pass_s):
            raise UsageError(f"pass_s must have a time for each of {len(self.rows)} numbers of rows, got {len(self.pass_s)}")
        if min(self.pass_key_s, self.row_key_s) < 0:
            raise UsageError(f"pass_key_s and row_key_s must be at least 0, got {self.pass_key_s} and {self.row_key_s}")
        if not min(self.plain_s, self.streams_s, self.level_s, *self.pass_s) > 0:
            raise UsageError(f"every time must be above 0, got {self}")

    def verify_s(self, rows: int) -> float:
        """A pass of so many rows: on a straight line between the points, behind the last at its last slope."""
        above = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        if above == 0:
            return self.pass_s[0]
        (r0, r1), (s0, s1) = self.rows[above - 1 : above + 1], self.pass_s[above - 1 : above + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)

    @cached_property
    def row_s(self) -> float:
        """What a further row adds to a pass, at least."""
        points = list(zip(self.rows, self.pass_s, strict=True))
        return max(0.0, min(((s1 - s0) / (r1 - r0) for (r0, s0), (r1, s1) in pairwise(points)), default=0.0))

    def at(self, context: int) -> CostCurve:
        """The same behind a longer text."""
        further = context - self.context
        if further <= 0 or not self.pass_key_s + self.row_key_s:
            return self
        added = [further * (self.pass_key_s + rows * self.row_key_s) for rows in self.rows]
        passes = tuple(seconds + more for seconds, more in zip(self.pass_s, added, strict=True))
        return replace(self, plain_s=self.plain_s + added[0], pass_s=passes, context=context)

    def draft_s(self, depth: int) -> float:
        """Streams, and a tree of so many levels; nothing is spent on depth 0."""
        return self.streams_s + depth * self.level_s if depth else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostCurve:
        """What `to_dict` gave, through JSON and back."""
        return cls(**{**values, "rows": tuple(values["rows"]), "pass_s": tuple(values["pass_s"])})
