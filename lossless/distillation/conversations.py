"""Conversations: which prompts the base is asked, in what order, and how a talk goes on after its answer.

Knows: prompts, the model's template and context, and which answers are there already. Does not know: how answers are
made or stored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..base.layers import context_limit
from ..base.loading import Base, check_tokens
from ..errors import UsageError
from .answers import Answers
from .batching import Job
from .config import DistillConfig
from .prompts import Message, Prompt, encode

_LENGTH_WINDOW = 16  # batches of prompts sorted together: rows of like length share one cache without much padding


def digest(prompts: Sequence[Prompt]) -> str:
    """Tells these prompts, in this order, from others."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.id, prompt.messages, prompt.later]).encode())
    return found.hexdigest()[:16]


class Conversations:
    """Every prompt as a conversation: the user's turns are given, the answers are the base's own.

    Args:
        done: the answers that are there already.

    Attributes:
        skipped: turns that were not asked, each with the reason.
    """

    def __init__(self, base: Base, prompts: Sequence[Prompt], config: DistillConfig, done: Answers) -> None:
        self.base, self.prompts, self.config = base, prompts, config
        self.skipped: list[str] = []
        self._context = context_limit(base.model)
        self._done = {id: number for number, id in enumerate(done.column("id"))}
        self._answers = done
        self._told: dict[int, tuple[Message, ...]] = {}  # of the conversations that wait for an answer

    def opening_jobs(self, process: int, processes: int) -> Iterator[Job]:
        """The next job of every conversation that is not over, dealt out to the processes in turn.

        They come in random order, so that all sources have their share however early the job ends, and in batches of
        like length, so that little of a batch is padding.
        """
        rng, order = random.Random(self.config.seed), list(range(len(self.prompts)))
        rng.shuffle(order)
        jobs = filter(None, map(self._next, order[process::processes]))
        size = self.config.batch_size
        while window := sorted(itertools.islice(jobs, _LENGTH_WINDOW * size), key=lambda job: len(job.prompt_ids)):
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            rng.shuffle(batches)
            yield from itertools.chain(*batches)

    def go_on(self, job: Job, answer: list[int]) -> Job | None:
        """The next turn of a conversation after this answer, if it has one."""
        number, turn = self._place(job)
        told, (_, later) = self._told.pop(number), self.prompts[number].from_the_start()
        if turn + 1 >= min(self.config.max_turns, 1 + len(later)):
            return None
        answered = {"role": "assistant", "content": self.base.tokenizer.decode(answer, skip_special_tokens=True).strip()}
        return self._job(number, turn + 1, (*told, answered, {"role": "user", "content": later[turn]}))

    def record(self, job: Job, answer: list[int]) -> dict[str, Any]:
        """An answer as it is stored."""
        number, turn = self._place(job)
        return {**asdict(job), "category": self.prompts[number].category, "turn": turn, "answer_ids": answer}

    @staticmethod
    def _place(job: Job) -> tuple[int, int]:
        number, turn = job.id.split(":")[0].split("/")
        return int(number), int(turn)

    def _next(self, number: int) -> Job | None:
        """The first turn of a conversation that has no answer yet."""
        job = self._job(number, 0, self.prompts[number].from_the_start()[0])
        while job and job.id in self._done:
            job = self.go_on(job, self._answers[self._done[job.id]]["answer_ids"])
        return job

    def _job(self, number: int, turn: int, messages: tuple[Message, ...]) -> Job | None:
        """Turn `turn` of conversation `number`; None, and noted, if it has become too long or the template refuses it."""
        name = f"{number}/{turn}:{self.prompts[number].id}"
        try:
            ids = encode(self.base.tokenizer, messages)
            check_tokens(ids, self.base.model)
        except UsageError as error:
            self.skipped.append(f"{name}: {error}")
            return None
        # a later turn may be as much longer as the answers before it
        most = self.config.max_prompt_tokens + turn * self.config.max_new_tokens
        if self._context is not None:
            most = min(most, self._context - self.config.max_new_tokens)
        if len(ids) > most:
            self.skipped.append(f"{name}: a prompt of {len(ids)} tokens, at most {most} are taken")
            return None
        self._told[number] = messages
        return Job(name, ids, self.config.temperatures[number % len(self.config.temperatures)])
