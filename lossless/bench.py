"""Paired measurements: the plain base against the accelerated one, on the same prompts.

Knows: the clock, the order of the runs, and what a report holds. Does not know: how either side works.

Both sides are timed by one `Clock`, a stopping criterion that notes the time of every emitted token:
the same clock, the same token counter and the same stop rule. Decode time runs from the first token to
the last, so the prefill is on neither side. Sides take turns in going first. Where only acceptance is asked for, the
plain side is left out, and what would compare with it is None.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from .errors import UsageError, require_at_least
from .generate import AcceleratedModel
from .models import Base, context_limit, device_name
from .prompts import Prompt, encode
from .storage import resumed, versions


@dataclass(frozen=True)
class Decoding:
    """What is asked of `generate` on both sides."""

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_new_tokens")
        if self.temperature <= 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        if self.do_sample:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return found


class Clock(StoppingCriteria):
    """Notes when each token was there; never stops anything."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def decode_s(self) -> float:
        return self.ticks[-1] - self.ticks[0]


@dataclass(frozen=True)
class Run:
    """One prompt, answered by both sides, or by the accelerated one alone: then what compares is None."""

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


def encode_checked(base: Base, prompts: list[Prompt], decoding: Decoding) -> list[torch.Tensor]:
    """Token ids `[1, length]` of every prompt, each checked against the model's context.

    Raises:
        UsageError: a prompt and its answer would not fit.
    """
    limit = context_limit(base.model)
    found = []
    for prompt in prompts:
        ids = encode(base.tokenizer, prompt.messages)
        if limit is not None and len(ids) + decoding.max_new_tokens > limit:
            raise UsageError(
                f"prompt {prompt.id!r} has {len(ids)} tokens; with max_new_tokens={decoding.max_new_tokens} "
                f"that exceeds the model's context of {limit}"
            )
        found.append(torch.tensor([ids], device=base.model.device))
    return found


def timed_generate(model: Any, ids: torch.Tensor, decoding: Decoding) -> tuple[list[int], Clock]:
    """Answer token ids and when they came; `model` is a base or an `AcceleratedModel`."""
    clock = Clock()
    torch.manual_seed(decoding.seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([clock]),
        **decoding.arguments(),
    )
    return out[0, ids.shape[1] :].tolist(), clock


def run_pair(
    base: Base, fast: AcceleratedModel, prompt: Prompt, ids: torch.Tensor, decoding: Decoding, fast_first: bool, plain: bool = True
) -> Run:
    """Both sides on one prompt, or the accelerated one alone."""
    before = timed_generate(base.model, ids, decoding) if plain and not fast_first else None
    tokens, clock = timed_generate(fast, ids, decoding)
    expected = timed_generate(base.model, ids, decoding) if plain and fast_first else before
    return Run(
        id=prompt.id,
        category=prompt.category,
        prompt_tokens=ids.shape[1],
        tokens=len(tokens),
        decode_s=clock.decode_s,
        target_passes=fast.stats.target_passes,
        drafted=fast.stats.drafted,
        speculated=fast.stats.speculated,
        pruned_wrongly=fast.stats.pruned_wrongly,
        reread=fast.stats.reread,
        acceptance_length=fast.stats.acceptance_length,
        tokens_per_s=_rate(clock),
        answer=base.tokenizer.decode(tokens, skip_special_tokens=True),
        **({} if expected is None else _compared(*expected, tokens, clock)),
    )


def _compared(expected: list[int], base_clock: Clock, tokens: list[int], clock: Clock) -> dict[str, Any]:
    """The fields of a run that take both sides."""
    baseline, ours = _rate(base_clock), _rate(clock)
    same = [a == b for a, b in zip(expected, tokens, strict=False)]
    identical = expected == tokens
    return {
        "identical": identical,
        "first_difference": None if identical else (same.index(False) if False in same else len(same)),
        "baseline_decode_s": base_clock.decode_s,
        "baseline_tokens_per_s": baseline,
        "speedup": ours / baseline if baseline and ours else 1.0,
    }


def _rate(clock: Clock) -> float:
    """Tokens a second after the first; 0 for an answer of one token, which has no decode time."""
    return (len(clock.ticks) - 1) / clock.decode_s if len(clock.ticks) > 1 else 0.0


def bench(
    base: Base,
    fast: AcceleratedModel,
    name: str,
    prompts: list[Prompt],
    decoding: Decoding,
    load_in: str | None = None,
    journal: Path | None = None,
    plain: bool = True,
) -> dict[str, Any]:
    """Every prompt on both sides, interleaved, after one warm-up that is not counted.

    Args:
        name: the adapter's.
        journal: a file that keeps each pair of runs as it is made; a later call with the same one goes on after them.
        plain: with the plain side; without it acceptance is measured, and nothing compared.

    Returns:
        Everything that a reader needs to repeat and to judge the runs, ready for JSON.

    Raises:
        UsageError: a prompt does not fit, or the journal is another report's.
    """
    encoded = encode_checked(base, prompts, decoding)
    header = settings(base, fast, name, load_in, decoding) | {"plain": plain}
    with resumed(journal, whose("bench", header, fast, encoded)) as (kept, write), tqdm(total=len(prompts), unit="prompt", desc="bench") as bar:
        runs = [Run(**run) for run in kept]
        bar.update(len(runs))
        if len(runs) < len(prompts):
            warm_up = Decoding(max_new_tokens=min(8, decoding.max_new_tokens))
            run_pair(base, fast, prompts[0], encoded[0], warm_up, fast_first=False, plain=plain)
        for number in range(len(runs), len(prompts)):
            runs.append(run_pair(base, fast, prompts[number], encoded[number], decoding, fast_first=number % 2 == 1, plain=plain))
            write(asdict(runs[-1]))
            bar.update()
            so_far = summarize(runs)
            compared = {"identical": f"{so_far['identical']}/{len(runs)}", "speedup": f"{so_far['speedup']:.2f}"} if plain else {}
            bar.set_postfix(acceptance=f"{so_far['acceptance_length']:.2f}", **compared)
    return header | {
        **summarize(runs),
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
        "device": device_name(base.model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "decoding": asdict(decoding),
        "tree_nodes": fast.tree_nodes,
        "schedule": fast.schedule,
        "recall": fast.recall,
        "pruning_floor": fast.pruning_floor if fast.adapter.pruning is not None else None,
        "guarantee": fast.guarantee.describe(),
    }


def whose(command: str, header: dict[str, Any], fast: AcceleratedModel, encoded: list[torch.Tensor]) -> dict[str, Any]:
    """The first line of a journal: the same measurement, with these settings, of these prompts, goes on with it."""
    # what a probe measures differs in its last digits from one attach to the next
    lasting = {key: value for key, value in header.items() if key != "guarantee"}
    asked = hashlib.sha256(str([ids.tolist() for ids in encoded]).encode()).hexdigest()
    return {"command": command} | lasting | {"exact": header["guarantee"]["exact"], "prompt_ids": asked}


def _pooled_acceptance(runs: list[Run]) -> float:
    passes = sum(r.target_passes for r in runs)
    return sum(r.tokens - 1 for r in runs) / passes if passes else 1.0


def summarize(runs: list[Run]) -> dict[str, Any]:
    """The figures of some runs: totals, pooled acceptance length, medians over prompts."""
    return {
        "prompts": len(runs),
        "tokens": sum(r.tokens for r in runs),
        "identical": None if any(r.identical is None for r in runs) else sum(bool(r.identical) for r in runs),
        "reread": sum(r.reread for r in runs),
        "speculated": sum(r.speculated for r in runs),
        "pruned_wrongly": sum(r.pruned_wrongly for r in runs),
        "acceptance_length": round(_pooled_acceptance(runs), 4),
        "baseline_tokens_per_s": _median((r.baseline_tokens_per_s for r in runs), 3),
        "tokens_per_s": _median((r.tokens_per_s for r in runs), 3),
        "speedup": _median((r.speedup for r in runs), 4),
    }


def _median(values: Iterable[float | None], digits: int) -> float | None:
    """Of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known), digits) if known else None


def _categories(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.category for run in runs))


def table(found: dict[str, Any]) -> str:
    """A report as a text table, one line a category and one for all."""
    head = f"{'category':<24}{'prompts':>8}{'tokens':>8}{'identical':>11}{'accepted':>10}{'base t/s':>10}{'fast t/s':>10}{'speedup':>9}"
    lines = [head, "-" * len(head)]
    rows = list(found["categories"].items()) if len(found["categories"]) > 1 else []
    for name, s in [*rows, ("all", found)]:
        same, baseline, speedup = "-", "-", "-"
        if s["identical"] is not None:
            same, baseline, speedup = f"{s['identical']}/{s['prompts']}", f"{s['baseline_tokens_per_s']:.1f}", f"{s['speedup']:.2f}"
        lines.append(
            f"{name or '-':<24}{s['prompts']:>8}{s['tokens']:>8}{same:>11}{s['acceptance_length']:>10.2f}"
            f"{baseline:>10}{s['tokens_per_s']:>10.1f}{speedup:>9}"
        )
    return "\n".join(lines)
