"""What a cost curve tells before any training: the speedup of each acceptance length, where it breaks even, its limit.

Knows: arithmetic on a `CostCurve`, and a model of acceptance. Does not know: what an adapter will accept, nor how the
curve was measured.

**Speedup.** A step drafts a tree of n rows and depth d (its root is certain, so n >= d + 1), verifies it in one pass
and emits tau tokens in the mean: those accepted, and the base's own choice after the last of them. Counted in plain
tokens,

    S = tau / C(n, d),    C(n, d) = (verify_s(n) + draft_s(d)) / plain_s

and a step breaks even at tau = C. No path is longer than d, so for any adapter and any text

    tau <= d + 1,    S <= max over d and n >= d + 1 of (d + 1) / C(n, d)                                             (1)

also where trees differ from step to step: a ratio of sums is at most the greatest of the ratios.

**Acceptance.** Let a_j be the probability that depth j is accepted if depth j - 1 was: for a chain that of its one
token, for a tree the mass that the siblings at that depth cover. Then, with one rate a for all depths on the right,

    tau(d) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_d = (1 - a^(d+1)) / (1 - a) < 1 / (1 - a)                           (2)

**The best depth.** A chain has d + 1 rows; write C(d) for its cost and D(d) = C(d+1) - C(d). For D(d) > 0, S(d+1)
lies between S(d) and a^(d+1) / D(d), so a level more pays while what it adds for its cost exceeds the average:

    S(d+1) > S(d)  if and only if  a^(d+1) / D(d) > S(d)                                                             (3)

Where D does not fall, the left side falls, and the first depth that does not pay ends the search. (What starts the
streams is in their D(0); depth 0 is compared apart.) With linear costs C(d) = A + B d for d >= 1, a^(d+1) falls to 0
while S(d) rises up to the best depth: for a < 1 and B > 0 that depth is finite and, by (3) on both sides of it, if it
is not 0,

    a^(d+1) <= B S(d) <= a^d,    S(d) <= min(1 / (A (1 - a)), max(1 / A, 1 / B))                                     (4)

the last because (1 + d) / (A + B d) lies between 1 / A and 1 / B. Where rows and levels are free (B -> 0, a pass
bound by memory) S -> 1 / (A (1 - a)), and with free streams A = verify_s(1) / plain_s. Where a row costs a plain
token (A, B >= 1, a pass bound by arithmetic) nothing is gained.

**Streams against a draft model.** A draft model runs d passes of c plain tokens each; streams are run once, for s,
and a level costs l. With v(d) = verify_s(d+1) / plain_s,

    draft model: C(d) = v(d) + c d,    streams: C(d) = v(d) + s + l d                                                (5)

By (3) a draft model's first token pays if and only if a > (c + v(1) - v(0)) / v(0). By (4), as v >= 1, a draft model
with c <= 1 has S <= min(1 / (1 - a), 1 / c), and streams with l <= 1 + s have S <= min(1 / ((1 + s) (1 - a)), 1 / l).
With the same depth and acceptance, streams are faster if and only if c > l + s / d.

**Assumed** of drafts, everywhere: they are the streams', so that d is at most their number. What repeats the text itself (`recall`) may be longer, and
where a text repeats much, tau and S go beyond (1). Assumed of acceptance, by (2) to (4): it depends on no more than that the ancestors were accepted (independence),
and its rates are those of every step (stationarity; if a differs between steps, tau is above (2) at the mean a, as
a^j is convex). Assumed of costs, everywhere: they do not depend on the length of the context, streams cost the same
however many they are, and a draft model needs no pass to catch up with what was accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np

from ..drafting.costs import CostCurve
from ..errors import UsageError, require_at_least

ACCEPTANCE_RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DRAFT_COSTS = (0.05, 0.1, 0.2, 0.4)


def expected_length(acceptance: Sequence[float]) -> float:
    """Tokens that a step emits in the mean, equation (2); `acceptance[j]`: of depth j + 1 if depth j was accepted.

    Raises:
        UsageError: a rate outside 0 to 1.
    """
    _require_rates(acceptance)
    return sum(accumulate(acceptance, mul, initial=1.0))


def _require_rates(acceptance: Sequence[float]) -> None:
    for rate in acceptance:
        if not 0 <= rate <= 1:
            raise UsageError(f"acceptance must be from 0 to 1, got {rate}")


@dataclass(frozen=True)
class Best:
    """The draft with the highest speedup (times plain decoding): its depth, rows of its pass, emitted tokens a pass."""

    depth: int
    rows: int
    acceptance_length: float
    speedup: float


def best(curve: CostCurve, acceptance: float, deepest: int | None = None, draft_cost: float | None = None) -> Best:
    """The best depth where every depth is accepted at one rate; at rate 1 the limit (1). Of equals, the shallowest.

    Args:
        acceptance: probability that a drafted token is accepted if its ancestors were.
        deepest: depths from 0 (nothing is drafted) to this are compared; None for all that the curve was measured for.
        draft_cost: one pass of a draft model, in plain tokens; None for streams.

    Raises:
        UsageError: a rate outside 0 to 1, a depth beyond the measured rows, or a cost that is negative or not finite.
    """
    _require_rates([acceptance])
    most = curve.rows[-1] - 1
    deepest = most if deepest is None else deepest
    if not 0 <= deepest <= most:
        raise UsageError(f"deepest must be from 0 to {most}, one less than the most rows measured, got {deepest}")
    if draft_cost is not None and not 0 <= draft_cost < math.inf:
        raise UsageError(f"draft_cost must be at least 0 and finite, got {draft_cost}")

    def of_depth(depth: int) -> Best:
        # a measured curve need not rise everywhere: a pass with rows to spare may be the cheaper one
        rows = min((depth + 1, *(more for more in curve.rows if more > depth + 1)), key=curve.verify_s)
        draft_s = curve.draft_s(depth) if draft_cost is None else depth * draft_cost * curve.plain_s
        length = expected_length([acceptance] * depth)
        return Best(depth, rows, length, length * curve.plain_s / (curve.verify_s(rows) + draft_s))

    return max(map(of_depth, range(deepest + 1)), key=lambda found: found.speedup)


@dataclass(frozen=True)
class Forecast:
    """What can be told of a machine before any training.

    Attributes:
        curve: what a step costs there.
        depth: levels that a tree is grown to, the number of streams; a tree of fewer rows is a chain at the deepest.

    Raises:
        UsageError: a depth below 1, or one whose chain has more rows than were measured.
    """

    curve: CostCurve
    depth: int

    def __post_init__(self) -> None:
        require_at_least(1, self, "depth")
        if self.depth > (most := self.curve.rows[-1] - 1):
            raise UsageError(f"depth must be at most {most}, one less than the most rows measured, got {self.depth}")

    @property
    def lengths(self) -> tuple[float, ...]:
        """Acceptance lengths to ask for: halves up to 4, then whole ones, up to the longest that there is."""
        longest = self.depth + 1
        return (*(half / 2 for half in range(2, 2 * min(longest, 4) + 1)), *map(float, range(5, longest + 1)))

    def longest(self, rows: int) -> int:
        """The acceptance length of a tree of so many rows if one of its longest paths is accepted whole."""
        return min(self.depth, rows - 1) + 1

    def break_even(self, rows: int) -> float:
        """The acceptance length that a pass of so many rows must exceed to be faster than plain decoding."""
        return (self.curve.verify_s(rows) + self.curve.draft_s(self.longest(rows) - 1)) / self.curve.plain_s

    def speedup(self, acceptance_length: float, rows: int) -> float | None:
        """Times plain decoding; None for a length that no tree of so many rows has.

        Raises:
            UsageError: an acceptance length below 1.
        """
        if not acceptance_length >= 1:
            raise UsageError(f"acceptance_length must be at least 1, got {acceptance_length}")
        return acceptance_length / self.break_even(rows) if acceptance_length <= self.longest(rows) else None

    def limit(self) -> Best:
        """Equation (1): no tree of at most this depth is faster on this machine, whatever is accepted."""
        return best(self.curve, 1.0, self.depth)

    def tied_draft_cost(self) -> float:
        """Plain tokens that a pass of a draft model may cost for it to draft to this depth as fast as the streams."""
        return self.curve.draft_s(self.depth) / (self.depth * self.curve.plain_s)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; lists within `by_length` have an entry for each of the curve's `rows`."""
        rows = self.curve.rows
        return {
            "curve": self.curve.to_dict(),
            "depth": self.depth,
            "limit": asdict(self.limit()),
            "tied_draft_cost": self.tied_draft_cost(),
            "break_even": [self.break_even(n) for n in rows],
            "by_length": [
                {"acceptance_length": length, "speedup": [self.speedup(length, n) for n in rows]}
                for length in self.lengths
            ],
            "by_rate": [
                {
                    "acceptance": rate,
                    "streams": asdict(best(self.curve, rate)),
                    "draft_model": [
                        {"draft_cost": cost, **asdict(best(self.curve, rate, draft_cost=cost))} for cost in DRAFT_COSTS
                    ],
                }
                for rate in ACCEPTANCE_RATES
            ],
        }


@dataclass(frozen=True)
class Simulation:
    """Steps that were played: emitted tokens per step, the standard error of that mean, seconds of them all."""

    acceptance_length: float
    standard_error: float
    seconds: float


def simulate(acceptance: Sequence[float], step_s: float, steps: int, seed: int = 0) -> Simulation:
    """Play steps of a chain: each emits the tokens up to the first that is refused, and the base's own in its place.

    Args:
        acceptance: as for `expected_length`.
        step_s: seconds that each step takes.

    Raises:
        UsageError: a rate outside 0 to 1, a time that is not above 0, or fewer than 2 steps (no standard error).
    """
    _require_rates(acceptance)
    if not step_s > 0:
        raise UsageError(f"step_s must be above 0, got {step_s}")
    if steps < 2:
        raise UsageError(f"steps must be at least 2, got {steps}")
    agreed = np.random.default_rng(seed).random((steps, len(acceptance))) < np.asarray(acceptance)
    emitted = 1 + np.logical_and.accumulate(agreed, axis=1).sum(axis=1)
    return Simulation(float(emitted.mean()), float(emitted.std(ddof=1)) / math.sqrt(steps), steps * step_s)


def table(forecast: Forecast) -> str:
    """Two text tables: speedup by acceptance length and rows, then the best depth by acceptance rate."""
    return "\n".join([*_by_length(forecast), "", *_by_rate(forecast.curve)])


def _by_length(forecast: Forecast) -> list[str]:
    rows, depth, limit, tied = forecast.curve.rows, forecast.depth, forecast.limit(), forecast.tied_draft_cost()

    def line(name: str, values: list[float | None]) -> str:
        return f"{name:<19}" + "".join(f"{'-' if value is None else f'{value:.2f}':>8}" for value in values)

    head = f"{'acceptance length':<19}" + "".join(f"{f'{n} rows' if n > 1 else '1 row':>8}" for n in rows)
    return [
        f"Speedup over plain decoding, trees of depth {depth} at most (-: longer than any path of so many rows)",
        "",
        head,
        "-" * len(head),
        *(line(f"{length:.1f}", [forecast.speedup(length, n) for n in rows]) for length in forecast.lengths),
        "-" * len(head),
        line("break-even length", [forecast.break_even(n) for n in rows]),
        line("speedup at most", [forecast.speedup(forecast.longest(n), n) for n in rows]),
        "",
        f"Limit of such trees (what repeats the text itself may go beyond): {limit.speedup:.2f}, at depth {limit.depth} in {limit.rows} rows, all tokens accepted.",
        f"At depth {depth} streams draft as fast as a draft model of {tied:.3f} plain tokens a pass.",
    ]


def _by_rate(curve: CostCurve) -> list[str]:
    def cell(found: Best) -> str:
        mark = "+" if found.depth == curve.rows[-1] - 1 else " "
        return f"{f'{found.depth}{mark}':>9}{found.speedup:>9.2f}"

    head = f"{'rate':<11}{'length':>7}" + f"{'depth ':>9}{'speedup':>9}" * (1 + len(DRAFT_COSTS))
    lines = [
        "The best depth of a chain by acceptance rate (+: the deepest measured), with the streams' acceptance length,",
        "and for draft models of the same rate, by the cost of a pass in plain tokens",
        "",
        f"{'acceptance':<11}{'streams':>25}" + "".join(f"{f'draft model {c}':>18}" for c in DRAFT_COSTS),
        head,
        "-" * len(head),
    ]
    for rate in ACCEPTANCE_RATES:
        streams, models = best(curve, rate), [best(curve, rate, draft_cost=c) for c in DRAFT_COSTS]
        lines.append(f"{rate:<11}{streams.acceptance_length:>7.2f}" + "".join(map(cell, (streams, *models))))
    return lines


def draw(forecast: Forecast, path: Path) -> None:
    """Speedup against acceptance length as a PNG, a line for each number of rows, from nothing accepted to all."""
    from matplotlib import colormaps  # takes half a second that most commands need not wait
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="black", linestyle="--", label="plain decoding")
    rows = forecast.curve.rows
    for number, n in enumerate(rows):
        longest, even = forecast.longest(n), forecast.break_even(n)
        color = colormaps["viridis"](0.9 * number / (len(rows) - 1))
        even_at = f"breaks even at {even:.2f}" if even <= longest else "never breaks even"
        label = f"{n} row{'s' if n > 1 else ''}, {even_at}"
        axes.plot([1, longest], [1 / even, longest / even], color=color, marker=".", label=label)
    axes.set(xlabel="acceptance length (tokens emitted per target pass)", ylabel="speedup (times plain decoding)")
    axes.set_ylim(0, None)
    axes.set_title(
        f"Speedup by the cost curve, trees of depth {forecast.depth} at most\n"
        "(lines end where every drafted token is accepted)"
    )
    axes.grid(alpha=0.3)
    figure.legend(title="rows of a pass", loc="outside right upper")
    figure.savefig(path, format="png", dpi=120)
