"""How much memory answers take, plain and accelerated, each in a process of its own.

Knows: what the system says is resident, sampled while a model answers behind a long text and then again and again. Does not know:
what takes it, but for the weights that a packed twin copies, which are known exactly. On a CPU only: a GPU's own counters are in
the reports of `bench`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import psutil
import torch

from ..errors import UsageError, require_at_least

_EVERY_S = 0.002
_MIB = 2**20
_SHORT = 16  # tokens of a short answer
SIDES = ("plain", "accelerated")


@dataclass(frozen=True)
class Trial:
    """What is asked of each side.

    Attributes:
        context: tokens of the long text, its answer included.
        answer: new tokens of the long text.
        generations: short answers that follow, of 16 tokens each.

    Raises:
        UsageError: a value out of range.
    """

    context: int = 2048
    answer: int = 64
    generations: int = 200

    def __post_init__(self) -> None:
        require_at_least(1, self, "answer")
        require_at_least(2, self, "generations")
        if self.context <= self.answer:
            raise UsageError(f"context must be above the answer's {self.answer} tokens, got {self.context}")


@dataclass(frozen=True)
class Footprint:
    """What one side took, in MiB resident.

    Attributes:
        loaded: with the model, and its adapter, loaded and ready.
        peak: the most while it answered behind the long text.
        early, late: after the first and the last tenth of the short answers.
        twin: weights that a packed twin copies, part of all the others.
    """

    loaded: float
    peak: float
    early: float
    late: float
    twin: float = 0.0


def compare(ready: Callable[[str], tuple[Any, float]], trial: Trial) -> dict[str, Any]:
    """The footprints of both sides, and their ratios.

    Args:
        ready: picklable; given a side, loads a model that has `generate`, and says how many MiB a packed twin of it copies.
    """
    found = {}
    for side in SIDES:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            found[side] = alone.submit(_footprint, ready, side, trial).result()
    plain, fast = found["plain"], found["accelerated"]
    return {
        "trial": asdict(trial),
        "sides": {side: asdict(footprint) for side, footprint in found.items()},
        "peak_ratio": round(fast.peak / plain.peak, 3),
        "peak_ratio_without_twin": round((fast.peak - fast.twin) / plain.peak, 3),
    }


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'MiB resident':<14}{'loaded':>9}{'peak':>9}{'early':>9}{'late':>9}{'twin':>9}"]
    for side, footprint in found["sides"].items():
        lines.append(f"{side:<14}" + "".join(f"{footprint[name]:9.0f}" for name in ("loaded", "peak", "early", "late", "twin")))
    trial = found["trial"]
    lines.append(
        f"\npeak behind {trial['context']} tokens: {found['peak_ratio']:.2f} times the plain model's, "
        f"{found['peak_ratio_without_twin']:.2f} without the twin's weights; early and late: after a tenth and after all of "
        f"{trial['generations']} short answers"
    )
    return "\n".join(lines)


def _footprint(ready: Callable[[str], tuple[Any, float]], side: str, trial: Trial) -> Footprint:
    model, twin = ready(side)
    words = int(model.config.get_text_config().vocab_size)
    text = torch.randint(3, words, (1, 64), generator=torch.Generator().manual_seed(0)).repeat(1, trial.context // 64 + 1)

    def answer(prompt: int, new: int) -> None:
        ids = text[:, :prompt]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)

    answer(32, 8)  # what the first call allocates is not of the long text
    loaded = _resident()
    peak = _most_resident(lambda: answer(trial.context - trial.answer, trial.answer))
    early = 0.0
    for number in range(trial.generations):
        answer(min(64, trial.context - trial.answer), _SHORT)
        if number == trial.generations // 10:
            early = _resident()
    return Footprint(loaded, peak, early, _resident(), twin)


def _resident() -> float:
    return round(psutil.Process().memory_info().rss / _MIB, 1)


def _most_resident(work: Callable[[], None]) -> float:
    """The most that is resident while something is done."""
    most, done = _resident(), threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(_EVERY_S):
            most = max(most, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most
