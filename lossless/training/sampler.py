"""The curriculum: which answers are learnt from, which are held out, and what each step visits.

Knows: folders of answers, and orders that are the same for the same seed. Does not know: losses, optimizers, processes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.fingerprint import fingerprint, fingerprint_differences
from ..base.loading import Base
from ..distillation.answers import Answers
from ..errors import UsageError
from ..storage import read_json
from ..streams.runner import StreamRunner
from .config import TrainConfig
from .features import Features, TrainBatch, make_batch

_WINDOW = 96  # answers whose stretches are visited in random order


def read_answers(base: Base, folders: list[Path]) -> tuple[Answers, list[dict[str, Any]]]:
    """Answers long enough to learn from, and where they came from, folder by folder."""
    read, provenance = [], []
    for folder in folders:
        if not (folder / "distill.json").is_file():
            raise UsageError(f"no answers in {folder}: make some with 'lossless distill --out {folder}'")
        written = read_json(folder / "distill.json")
        if differing := fingerprint_differences(written.pop("fingerprint", None), fingerprint(base.model, base.tokenizer)):
            raise UsageError(f"the answers in {folder} are another base's (other {', '.join(differing)})")
        read.append(Answers.read(folder))
        read[-1].check_ids(base.vocabulary, str(folder))
        provenance.append(written)
    answers = Answers.join(read)
    # one position needs a certain token, and one after it to draft
    return answers.select(i for i, length in enumerate(answers.lengths("answer_ids")) if length >= 3), provenance


def split(answers: Answers, config: TrainConfig) -> tuple[Answers, Answers]:
    """Held-out answers and the rest; the same ones whatever the order of the shards.

    What a conversation is called decides about it: when answers are added, none is held out that was learnt from before.
    """
    if len(answers) < config.held_out + config.answers_per_step:
        raise UsageError(
            f"training needs at least held_out + answers_per_step = {config.held_out + config.answers_per_step} "
            f"answers of three tokens or more, got {len(answers)}"
        )
    talks: dict[str, list[int]] = {}  # all turns of a conversation, and all answers to a prompt, are on one side
    ids = answers.column("id")
    for number in sorted(range(len(ids)), key=lambda i: ids[i]):
        talks.setdefault(ids[number].partition(":")[2] or ids[number], []).append(number)
    names = sorted(talks, key=lambda name: hashlib.sha256(f"{config.seed}/{name}".encode()).digest(), reverse=True)
    held: list[int] = []
    while len(held) < config.held_out:
        held += talks[names.pop()]
    rest = [number for name in names for number in talks[name]]
    if len(rest) < config.answers_per_step:
        raise UsageError(f"all but {len(rest)} answers belong to held-out conversations: more prompts are needed, or a lower held_out")
    return answers.select(held[: config.held_out]), answers.select(rest[: max(config.answers_per_step, int(config.data_fraction * len(rest)))])


def draft_vocabulary(answers: Answers, size: int) -> torch.Tensor:
    """The `size` tokens that the base emits most, in the order of their ids; more frequent or lower ids win."""
    ids, counts = np.unique(answers.emitted(), return_counts=True)
    best = ids[np.lexsort((ids, -counts))[:size]]
    return torch.from_numpy(np.sort(best)).long()


@dataclass(frozen=True)
class Visit:
    """What a step learns from: (answer, its first position there), and all answers that steps near it visit, by length."""

    stretches: list[tuple[int, int]]
    near: list[int]


class Order:
    """Which stretches of which answers each visit is of, epoch after epoch; the same for the same seed.

    Answers come in windows. Each stretch that the epoch visits of an answer of a window is visited once (or a little more
    often, where another process has more of them), in random order: a step sees many answers, and yet the base reads an
    answer only once. Every process has windows of its own, and all of them go on to
    their next ones at the same visit: what one of them reads nobody else waits for.
    """

    def __init__(self, answers: Answers, config: TrainConfig, process: int = 0, processes: int = 1) -> None:
        prompts, said = answers.lengths("prompt_ids"), answers.lengths("answer_ids")
        self._lengths = [before + length for before, length in zip(prompts, said, strict=True)]
        # an answer's last token but one is the last that is certain while there is something to draft
        self._stretches = [
            range(before - 1, before + length - 2, config.positions_per_answer)
            for before, length in zip(prompts, said, strict=True)
        ]
        self._config, self._process, self._processes = config, process, processes
        self._place = -1  # of the window that visits are of, among those of the epoch
        self._begin(0, 0)

    def visit(self, number: int) -> Visit:
        if number < self._first:
            self._begin(0, 0)
        while number >= self._first + self._ends[-1]:
            self._begin(self._epoch + 1, self._first + self._ends[-1])
        place = bisect.bisect_right(self._ends, number - self._first)
        if place != self._place:
            self._place, window = place, self._windows[place]
            stretches = [(answer, start) for answer in window for start in self._visited(answer)]
            random.Random(f"{self._config.seed}/{self._epoch}/{place}").shuffle(stretches)
            count = self._ends[place] - (self._ends[place - 1] if place else 0)
            # of like size; where the other processes have more to visit, some stretch is visited again
            self._steps = [stretches[i::count] or [stretches[i % len(stretches)]] for i in range(count)]
            self._near = sorted(window, key=lambda answer: self._lengths[answer])
        before = self._ends[place] - len(self._steps)
        return Visit(self._steps[number - self._first - before], self._near)

    def epochs(self, visits: int) -> float:
        """How often so many visits go through the answers."""
        return visits / self._ends[-1]

    def _begin(self, epoch: int, first: int) -> None:
        """Deal out an epoch, whose first visit is number `first`."""
        order = list(range(len(self._stretches)))
        random.Random(f"{self._config.seed}/{epoch}").shuffle(order)
        count = math.ceil(len(order) / _WINDOW / self._processes) * self._processes
        windows = [order[i::count] or order for i in range(count)]  # of like size; with fewer answers than processes some share
        rounds = [windows[i : i + self._processes] for i in range(0, count, self._processes)]
        self._epoch, self._first, self._place = epoch, first, -1
        self._windows = [windows[self._process] for windows in rounds]
        self._ends = list(itertools.accumulate(map(self._visits, rounds)))

    def _visited(self, answer: int) -> range:
        """Where the stretches of an answer begin that this epoch visits: one at least."""
        stretches, every = self._stretches[answer], self._config.visit_every
        return stretches[(answer + self._epoch) % min(every, len(stretches)) :: every]

    def _visits(self, windows: list[list[int]]) -> int:
        """How many visits take a window each, in the mean of the processes."""
        stretches = sum(len(self._visited(answer)) for window in windows for answer in window)
        return max(1, round(stretches / self._processes / self._config.answers_per_step))


def block(features: list[Features], visit: Visit, config: TrainConfig, gamma: int, runner: StreamRunner) -> TrainBatch:
    """The stretches of a visit, each a row; features: of the answer of each."""
    starts = [start for _, start in visit.stretches]
    left = max(len(f.ids) - 2 - start for f, start in zip(features, starts, strict=True))
    return make_batch(features, starts, min(config.positions_per_answer, left), gamma, runner.first_top, runner.model.dtype)
