"""The curriculum: which answers are learnt from, which are held out, and what each step visits.

Knows: folders of answers, and orders that are the same for the same seed. Does not know: losses, optimizers, processes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .answers import Answers
from .config import TrainConfig
from .errors import UsageError
from .features import Block, Features, make_block
from .models import Base, fingerprint, fingerprint_differences
from .streams import StreamRunner

_RUN = 32  # positions that share a row of a block
_LENGTH_WINDOW = 24  # batches whose answers are sorted by length, so that little of each is padding


def read_answers(base: Base, folders: list[Path]) -> tuple[Answers, list[dict[str, Any]]]:
    """Answers long enough to learn from, and where they came from, folder by folder."""
    read, provenance = [], []
    for folder in folders:
        if not (folder / "distill.json").is_file():
            raise UsageError(f"no answers in {folder}: make some with 'lossless distill --out {folder}'")
        written = json.loads((folder / "distill.json").read_text(encoding="utf-8"))
        if differing := fingerprint_differences(written.pop("fingerprint"), fingerprint(base.model, base.tokenizer)):
            raise UsageError(f"the answers in {folder} are another base's (other {', '.join(differing)})")
        read.append(Answers.read(folder))
        provenance.append(written)
    answers = Answers.join(read)
    # one position needs a certain token, and one after it to draft
    return answers.select(i for i, length in enumerate(answers.lengths("answer_ids")) if length >= 3), provenance


def split(answers: Answers, config: TrainConfig) -> tuple[Answers, Answers]:
    """Held-out answers and the rest; the same ones whatever the order of the shards."""
    if len(answers) < config.held_out + config.answers_per_step:
        raise UsageError(
            f"training needs at least held_out + answers_per_step = {config.held_out + config.answers_per_step} "
            f"answers of three tokens or more, got {len(answers)}"
        )
    talks: dict[str, list[int]] = {}  # all turns of a conversation, and all answers to a prompt, are on one side
    ids = answers.column("id")
    for number in sorted(range(len(ids)), key=lambda i: ids[i]):
        talks.setdefault(ids[number].partition(":")[2] or ids[number], []).append(number)
    names = sorted(talks)
    random.Random(config.seed).shuffle(names)
    held: list[int] = []
    while len(held) < config.held_out:
        held += talks[names.pop()]
    rest = [number for name in names for number in talks[name]]
    if len(rest) < config.answers_per_step:
        raise UsageError(f"all but {len(rest)} answers belong to held-out conversations: more prompts are needed, or a lower held_out")
    return answers.select(held[: config.held_out]), answers.select(rest[: max(config.answers_per_step, int(config.share * len(rest)))])


def draft_vocabulary(answers: Answers, size: int) -> torch.Tensor:
    """The `size` tokens that the base emits most, in the order of their ids; more frequent or lower ids win."""
    ids, counts = np.unique(answers.emitted(), return_counts=True)
    best = ids[np.lexsort((ids, -counts))[:size]]
    return torch.from_numpy(np.sort(best)).long()


def batches(lengths: list[int], config: TrainConfig, epoch: int) -> list[list[int]]:
    """The answers of each step of an epoch; the same for the same seed."""
    rng = random.Random(f"{config.seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    found: list[list[int]] = []
    window = config.answers_per_step * _LENGTH_WINDOW
    for begin in range(0, len(order), window):
        near = sorted(order[begin : begin + window], key=lambda i: lengths[i])
        found += [near[i : i + config.answers_per_step] for i in range(0, len(near), config.answers_per_step)]
    rng.shuffle(found)
    return found


class Order:
    """Which answers each visit is of, epoch after epoch."""

    def __init__(self, answers: Answers, config: TrainConfig) -> None:
        prompts, said = answers.lengths("prompt_ids"), answers.lengths("answer_ids")
        self._lengths, self._config, self._epoch = [a + b for a, b in zip(prompts, said, strict=True)], config, 0
        self._batches = batches(self._lengths, config, 0)

    def visit(self, number: int) -> list[int]:
        epoch, place = divmod(number, len(self._batches))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, batches(self._lengths, self._config, epoch)
        return self._batches[place]


def block(features: list[Features], config: TrainConfig, gamma: int, runner: StreamRunner, visit: int) -> Block:
    """Positions of each answer, from a random one on; a short answer gives all that it has.

    They come in short runs, each a row of the block: attention takes all streams of a row together, and what it costs
    grows with their square.
    """
    rng = random.Random(f"{config.seed}/block {visit}")
    runs = -(-config.positions_per_answer // _RUN)
    count = -(-config.positions_per_answer // runs)
    picked, starts = [], []
    for f in features:
        first, behind = f.prompt - 1, len(f.ids) - 2
        start = rng.randint(first, max(first, behind - config.positions_per_answer))
        for begin in range(start, max(start + 1, min(start + runs * count, behind)), count):
            picked.append(f)
            starts.append(begin)
    count = max(1, min(count, max(len(f.ids) - 2 - start for f, start in zip(picked, starts, strict=True))))
    return make_block(picked, starts, count, gamma, runner.first_top, runner.model.dtype)
