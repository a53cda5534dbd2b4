"""Paired measurements: the plain base, the accelerated one and their rivals, on the same prompts.

Knows: the order of the runs, what is compared, and what a report holds. Does not know: how a side works (evaluation/sides.py),
or how an answer is timed (evaluation/timing.py).

On each prompt the sides answer one after the other, and which of them goes first rotates from prompt to prompt. All are
timed by one clock, and decode time is told apart from the time to first token. What is compared is compared prompt by
prompt, with stock `model.generate` of the same model; where only acceptance is asked for, that side is left out, and what
would compare with it is None.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..base.loading import Base
from ..base.packed import is_packed
from ..base.processes import device_name
from ..distillation.prompts import Prompt
from ..errors import UsageError, require_types
from ..generation.model import AcceleratedModel
from ..storage import resumed, versions
from .machine import busy, process_peak_mib
from .sides import ACCELERATED, STOCK, Answer, Side, accelerated, stock
from .timing import Decoding, encode_checked


@dataclass(frozen=True)
class SideRun:
    """How one side answered one prompt.

    Attributes:
        tokens: emitted ones; tokens_per_s: while decoding, the prefill not counted, 0 for a single token.
        peak_memory_mib: the most that was allocated on the GPU meanwhile, the weights of all sides included; None on a CPU.
        identical: its tokens are those of stock; first_difference: the first place where they are not; speedup: its
            tokens a second over those of stock. All three None where stock was not measured.
    """

    tokens: int
    time_to_first_token_s: float
    decode_s: float
    tokens_per_s: float
    peak_memory_mib: float | None = None
    identical: bool | None = None
    first_difference: int | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Run:
    """One prompt, answered by every side. The fields up to `speedup` are of the accelerated side; what compares it with
    stock (the baseline) is None where stock was not measured.

    Attributes:
        accepted: how many passes emitted 1, 2, 3, ... tokens; sides: by name, in the order in which they answered.
    """

    id: str
    category: str
    prompt_tokens: int
    tokens: int
    decode_s: float
    target_passes: int
    drafted: int
    speculated: int
    pruned_wrongly: int
    reread: int
    acceptance_length: float
    tokens_per_s: float
    answer: str
    identical: bool | None = None
    first_difference: int | None = None
    baseline_decode_s: float | None = None
    baseline_tokens_per_s: float | None = None
    speedup: float | None = None
    accepted: dict[int, int] = field(default_factory=dict)
    sides: dict[str, SideRun] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any], names: Sequence[str]) -> Run:
        """What `asdict` gave, through JSON and back.

        Args:
            names: the sides that it is of.

        Raises:
            UsageError: it is something else.
        """
        try:
            accepted = {int(emitted): int(passes) for emitted, passes in values["accepted"].items()}
            sides = {name: SideRun(**values["sides"][name]) for name in names}
            run = cls(**{**values, "accepted": accepted, "sides": sides})
            for part in (run, *sides.values()):
                require_types(part)
            return run
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"a line of the journal is broken ({type(error).__name__}: {error}): remove the journal, and begin anew") from error


def run_sides(base: Base, fast: AcceleratedModel, prompt: Prompt, ids: torch.Tensor, decoding: Decoding, sides: Sequence[Side]) -> Run:
    """Every side on one prompt, in this order; the accelerated one is among them."""
    answers = {side.name: _answer(side, ids, decoding) for side in sides}
    expected = answers[STOCK][0] if STOCK in answers else None
    compared = {name: _compared(answer, expected) for name, answer in answers.items()}
    ours, theirs = compared[ACCELERATED], compared.get(STOCK)
    return Run(
        id=prompt.id,
        category=prompt.category,
        prompt_tokens=ids.shape[1],
        tokens=ours.tokens,
        decode_s=ours.decode_s,
        target_passes=fast.stats.target_passes,
        drafted=fast.stats.drafted,
        speculated=fast.stats.speculated,
        pruned_wrongly=fast.stats.pruned_wrongly,
        reread=fast.stats.reread,
        acceptance_length=fast.stats.acceptance_length,
        tokens_per_s=ours.tokens_per_s,
        answer=base.tokenizer.decode(answers[ACCELERATED][0][0], skip_special_tokens=True),
        identical=ours.identical,
        first_difference=ours.first_difference,
        baseline_decode_s=theirs.decode_s if theirs else None,
        baseline_tokens_per_s=theirs.tokens_per_s if theirs else None,
        speedup=ours.speedup,
        accepted=dict(sorted(fast.stats.accepted.items())),
        sides=compared,
    )


def _answer(side: Side, ids: torch.Tensor, decoding: Decoding) -> tuple[Answer, float | None]:
    """A side's answer, and the most MiB that it had on the GPU."""
    if not ids.is_cuda:
        return side.answer(ids, decoding), None
    torch.cuda.reset_peak_memory_stats(ids.device)
    answer = side.answer(ids, decoding)
    return answer, round(torch.cuda.max_memory_allocated(ids.device) / 2**20, 1)


def _compared(measured: tuple[Answer, float | None], stock_answer: Answer | None) -> SideRun:
    """What was measured of a side, held against stock's answer."""
    (tokens, clock), peak = measured
    told = SideRun(len(tokens), clock.time_to_first_token_s, clock.decode_s, clock.tokens_per_s, peak)
    if stock_answer is None:
        return told
    expected, reference = stock_answer
    same = [a == b for a, b in zip(expected, tokens, strict=False)]
    identical = expected == tokens
    return replace(
        told,
        identical=identical,
        first_difference=None if identical else (same.index(False) if False in same else len(same)),
        speedup=_ratio(clock.tokens_per_s, reference.tokens_per_s),
    )


def _ratio(ours: float, theirs: float) -> float:
    """Of two speeds; 1 where an answer of one token has none."""
    return ours / theirs if ours and theirs else 1.0


def bench(
    base: Base,
    fast: AcceleratedModel,
    name: str,
    prompts: list[Prompt],
    decoding: Decoding,
    load_in: str | None = None,
    journal: Path | None = None,
    plain: bool = True,
    rivals: Sequence[Side] = (),
    beside: int = 0,
) -> dict[str, Any]:
    """Every prompt on every side, interleaved, after a warm-up of each that is not counted.

    Args:
        name: the adapter's.
        journal: a file that keeps the runs of each prompt as they are made; a later call with the same one goes on after them.
        plain: with stock `model.generate`; without it nothing is compared.
        rivals: sides beyond stock and the accelerated one.
        beside: other processes that never rest, as many as these.

    Returns:
        Everything that a reader needs to repeat and to judge the runs, ready for JSON.

    Raises:
        UsageError: a prompt does not fit, or the journal is another report's.
    """
    if beside < 0:
        raise UsageError(f"beside must be at least 0, got {beside}")
    encoded = encode_checked(base, prompts, decoding)
    sides = [*([stock(base)] if plain else []), accelerated(base, fast), *rivals]
    header = settings(base, fast, name, load_in, decoding) | {"plain": plain, "beside": beside}
    asked = whose("bench", header | {"sides": [side.name for side in sides]}, fast, encoded)
    with resumed(journal, asked) as (kept, write), tqdm(total=len(prompts), unit="prompt", desc="bench") as bar, busy(beside):
        runs = [Run.from_dict(run, [side.name for side in sides]) for run in kept]
        bar.update(len(runs))
        if len(runs) < len(prompts):
            run_sides(base, fast, prompts[0], encoded[0], Decoding(max_new_tokens=min(8, decoding.max_new_tokens)), sides)
        for number in range(len(runs), len(prompts)):
            first = number % len(sides)
            runs.append(run_sides(base, fast, prompts[number], encoded[number], decoding, sides[first:] + sides[:first]))
            write(asdict(runs[-1]))
            bar.update()
            so_far = summarize(runs)
            compared = {"identical": f"{so_far['identical']}/{len(runs)}", "speedup": f"{so_far['speedup']:.2f}"} if plain else {}
            bar.set_postfix(acceptance=f"{so_far['acceptance_length']:.2f}", **compared)
    return header | {
        **summarize(runs),
        "sides": {side.name: _summarize_side(side, [run.sides[side.name] for run in runs]) for side in sides},
        "best_plain": _best_plain([side.name for side in sides if side.plain], runs),
        "process_peak_mib": process_peak_mib(),
        "categories": {category: summarize([r for r in runs if r.category == category]) for category in _categories(runs)},
        "runs": [asdict(run) for run in runs],
    }


def settings(base: Base, fast: AcceleratedModel, name: str, load_in: str | None, decoding: Decoding) -> dict[str, Any]:
    """What a measurement was made with."""
    return {
        "model": base.name,
        "adapter": name,
        "weights": fast.adapter.digest(),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "load_in": load_in,
        "packed": is_packed(base.model),
        "device": device_name(base.model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "decoding": asdict(decoding),
        "tree_nodes": fast.attached.most_nodes(fast.drafting),
        "adaptive": fast.drafting.adaptive,
        "schedule": fast.drafting.schedule,
        "recall": fast.drafting.recall,
        "pruning_floor": fast.drafting.pruning_floor if fast.adapter.pruning is not None else None,
        "guarantee": fast.guarantee.describe(),
    }


def whose(command: str, header: dict[str, Any], fast: AcceleratedModel, encoded: list[torch.Tensor]) -> dict[str, Any]:
    """The first line of a journal: the same measurement, with these settings, of these prompts, goes on with it."""
    # what a probe measures differs in its last digits from one attach to the next
    lasting = {key: value for key, value in header.items() if key != "guarantee"}
    asked = hashlib.sha256(str([ids.tolist() for ids in encoded]).encode()).hexdigest()
    return {"command": command} | lasting | {"exact": header["guarantee"]["exact"], "prompt_ids": asked}


def summarize(runs: list[Run]) -> dict[str, Any]:
    """The accelerated side in some runs: totals, pooled acceptance length, medians over prompts, quartiles of the paired ratios."""
    return {
        "prompts": len(runs),
        "tokens": sum(r.tokens for r in runs),
        "identical": _count(r.identical for r in runs),
        "reread": sum(r.reread for r in runs),
        "speculated": sum(r.speculated for r in runs),
        "pruned_wrongly": sum(r.pruned_wrongly for r in runs),
        "acceptance_length": round(_pooled_acceptance(runs), 4),
        "acceptance_by_depth": acceptance_by_depth(runs),
        "baseline_tokens_per_s": _median((r.baseline_tokens_per_s for r in runs), 3),
        "tokens_per_s": _median((r.tokens_per_s for r in runs), 3),
        "speedup": _median((r.speedup for r in runs), 4),
        "speedup_quartiles": _quartiles((r.speedup for r in runs), 4),
    }


def _summarize_side(side: Side, runs: list[SideRun]) -> dict[str, Any]:
    """One side over all prompts: medians and quartiles; `speedup` is the paired ratio against stock."""
    return {
        "dtype": side.dtype,
        "plain": side.plain,
        "same_tokens": side.same_tokens,
        "identical": _count(r.identical for r in runs),
        "time_to_first_token_s": _median((r.time_to_first_token_s for r in runs), 5),
        "tokens_per_s": _median((r.tokens_per_s for r in runs), 3),
        "tokens_per_s_quartiles": _quartiles((r.tokens_per_s for r in runs), 3),
        "speedup": _median((r.speedup for r in runs), 4),
        "speedup_quartiles": _quartiles((r.speedup for r in runs), 4),
        "peak_memory_mib": max((r.peak_memory_mib for r in runs if r.peak_memory_mib is not None), default=None),
    }


def _best_plain(names: list[str], runs: list[Run]) -> dict[str, Any] | None:
    """The plain side with the fastest median, and the paired ratio of the accelerated side against it."""
    if not names:
        return None
    speeds = {name: statistics.median(run.sides[name].tokens_per_s for run in runs) for name in names}
    best = max(names, key=speeds.__getitem__)
    ratios = [_ratio(run.tokens_per_s, run.sides[best].tokens_per_s) for run in runs]
    return {
        "side": best,
        "tokens_per_s": round(speeds[best], 3),
        "speedup": _median(ratios, 4),
        "speedup_quartiles": _quartiles(ratios, 4),
    }


def acceptance_by_depth(runs: list[Run]) -> list[float]:
    """The share of drafted passes that accepted at least 1, 2, 3, ... tokens of their draft."""
    passes = sum(sum(run.accepted.values()) for run in runs)
    deepest = max((emitted - 1 for run in runs for emitted in run.accepted), default=0)
    reached = [sum(n for run in runs for emitted, n in run.accepted.items() if emitted > depth) for depth in range(1, deepest + 1)]
    return [round(count / passes, 4) for count in reached]


def _pooled_acceptance(runs: list[Run]) -> float:
    passes = sum(r.target_passes for r in runs)
    return sum(r.tokens - 1 for r in runs) / passes if passes else 1.0


def _count(identical: Iterable[bool | None]) -> int | None:
    """How many are; None where it was not compared."""
    known = list(identical)
    return None if None in known else sum(map(bool, known))


def _median(values: Iterable[float | None], digits: int) -> float | None:
    """Of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known), digits) if known else None


def _quartiles(values: Iterable[float | None], digits: int) -> list[float] | None:
    """The first and the third, of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return [round(value, digits) for value in known * 2] or None
    low, _, high = statistics.quantiles(known, n=4, method="inclusive")
    return [round(low, digits), round(high, digits)]


def _categories(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.category for run in runs))
