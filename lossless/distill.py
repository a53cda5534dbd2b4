"""Self-distillation data: the frozen model's own answers to many prompts.

Knows: which prompts are answered how, how a conversation goes on, and a folder that several processes fill and that
can be taken up again after an interruption. Does not know: how a batch is decoded, adapters, or training. It stores
token ids only; the base's distributions are computed again when they are learnt from.

A folder holds `distill.json` (what was asked for, of which base), the answers in Arrow shards (answers.py), and
`drawn.jsonl`, the prompts that the model drew itself, if it did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .answers import Answers, AnswerWriter, mend
from .batch import Job, JobQueue, continue_all
from .errors import UsageError, require_at_least
from .models import Base, fingerprint, fingerprint_differences, processes
from .prompts import Message, Prompt, encode, encode_user_opening, from_text
from .storage import append_jsonl, read_jsonl, versions, write_json

_DRAWN_PROMPT_TOKENS = 96
_LENGTH_WINDOW = 16  # batches of prompts sorted together: rows of like length share one cache without much padding
_TRIAL_TOKENS = 4  # of each row of one batch: what the estimate of time goes by
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class DistillConfig:
    """What to ask of the base. Conversation number i is held at `temperatures[i % len]` (0 is greedy)."""

    answer_tokens: int = 600_000
    max_new_tokens: int = 256
    max_prompt_tokens: int = 384
    max_turns: int = 4
    batch_size: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    self_drawn: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "answer_tokens", "max_new_tokens", "max_prompt_tokens", "max_turns", "batch_size")
        require_at_least(0, self, "self_drawn")
        if not self.temperatures or min(self.temperatures) < 0:
            raise UsageError(f"temperatures must be at least 0, got {self.temperatures}")


def eos_ids(base: Base) -> set[int]:
    """Every id that ends an answer of this base."""
    found = base.model.generation_config.eos_token_id
    found = found if found is not None else base.tokenizer.eos_token_id
    return set(found if isinstance(found, list) else [] if found is None else [found])


@torch.inference_mode()
def distill(base: Base, prompts: list[Prompt], config: DistillConfig, folder: str | Path) -> dict[str, Any]:
    """Write answers until there are `config.answer_tokens` of them, or no more prompts.

    Running it again with the same arguments goes on where it stopped: every answer that was whole is kept. Under
    `accelerate launch` each process answers its part of the prompts.

    Returns:
        The summary that is also written into `distill.json`: answers, prompt and answer tokens.

    Raises:
        UsageError: the folder was begun with other settings or another base, or there are no prompts.
    """
    state, folder = processes(), Path(folder)
    settings = {"model": base.name, "config": json.loads(json.dumps(asdict(config)))}
    settings["fingerprint"] = fingerprint(base.model, base.tokenizer)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _check_same_job(folder, settings)
        mend(folder)
        write_json(folder / "distill.json", settings | {"versions": versions(), "complete": False})
        if config.self_drawn:
            _draw_prompts(base, config, folder)
    state.wait_for_everyone()
    if config.self_drawn:
        prompts = [from_text(r["prompt"], r["id"]) for r in read_jsonl(folder / "drawn.jsonl") if r["prompt"]] + list(prompts)
    if not prompts:
        raise UsageError("there are no prompts: name a prompt file, or let the model draw some (self_drawn)")

    done = Answers.read(folder)
    tokens = sum(done.lengths("answer_ids"))
    missing = -(-max(0, config.answer_tokens - tokens) // state.num_processes)  # this process's share, rounded up
    talks = _Conversations(base, prompts, config, done)
    skipped: list[str] = []
    queue = JobQueue(talks.opening_jobs(state.process_index, state.num_processes, skipped))
    if missing and state.is_main_process:
        turns = sum(min(config.max_turns, 1 + len(prompt.from_the_start()[1])) for prompt in prompts)
        most = (turns - len(done)) * config.max_new_tokens // state.num_processes
        print(_estimate(base, config, max(1, min(missing, most)), state.num_processes))
    state.wait_for_everyone()
    started, fresh = time.monotonic(), 0
    bar = tqdm(total=missing, unit="tok", desc="answers", disable=not state.is_main_process)
    with AnswerWriter(folder, state.process_index, settings | {"versions": versions()}) as writer, bar:
        answers = continue_all(
            base.model, queue, eos_ids=eos_ids(base), batch_size=config.batch_size, max_new_tokens=config.max_new_tokens,
            generator=torch.Generator(base.model.device).manual_seed(config.seed + len(done) + state.process_index),
        )  # fmt: skip
        while fresh < missing and (answered := next(answers, None)):
            job, answer = answered
            writer.write(talks.record(job, answer))
            if following := talks.go_on(job, answer, skipped):
                queue.put(following)
            fresh += len(answer)
            bar.update(len(answer))
    state.wait_for_everyone()
    seconds, done = time.monotonic() - started, Answers.read(folder)
    told = gather_object([(len(skipped), fresh)])
    summary = {
        "answers": len(done),
        "answer_tokens": sum(done.lengths("answer_ids")),
        "prompt_tokens": sum(done.lengths("prompt_ids")),
        "prompts_skipped": sum(count for count, _ in told),
        "answer_tokens_per_s": round(sum(count for _, count in told) / max(seconds, 1e-9), 1),
        "processes": state.num_processes,
    }
    if state.is_main_process:
        write_json(folder / "distill.json", settings | {"versions": versions(), "complete": True, **summary})
    return summary


def _check_same_job(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "distill.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = fingerprint_differences(before["fingerprint"], settings["fingerprint"])
    # asking for more tokens than before goes on with the same data, and so do batches that fit into memory
    differing = [k for k in settings["config"] if k not in ("answer_tokens", "batch_size") and before["config"].get(k) != settings["config"][k]]
    if other or differing:
        raise UsageError(
            f"{folder} was begun with other settings ({', '.join(differing + other)}): "
            "use them again to go on, or another folder to start anew"
        )


class _Conversations:
    """Every prompt as a conversation: the user's turns are given, the answers are the base's own.

    Args:
        done: the answers that are there already.
    """

    def __init__(self, base: Base, prompts: list[Prompt], config: DistillConfig, done: Answers) -> None:
        self.base, self.prompts, self.config = base, prompts, config
        self._done = {id: number for number, id in enumerate(done.column("id"))}
        self._answers = done
        self._told: dict[int, tuple[Message, ...]] = {}  # of the conversations that wait for an answer

    def opening_jobs(self, process: int, processes: int, skipped: list[str]) -> Iterator[Job]:
        """The next job of every conversation that is not over, windows of them sorted by length, so that little of a
        batch is padding; conversations are dealt out to the processes in turn."""
        window: list[Job] = []
        for number in range(process, len(self.prompts), processes):
            job = self._job(number, 0, self.prompts[number].from_the_start()[0], skipped)
            while job and job.id in self._done:
                job = self.go_on(job, self._answers[self._done[job.id]]["answer_ids"], skipped)
            if job:
                window.append(job)
            if len(window) >= _LENGTH_WINDOW * self.config.batch_size:
                yield from sorted(window, key=lambda job: len(job.prompt_ids))
                window = []
        yield from sorted(window, key=lambda job: len(job.prompt_ids))

    def go_on(self, job: Job, answer: list[int], skipped: list[str]) -> Job | None:
        """The next turn of a conversation after this answer, if it has one."""
        number, turn = self._place(job)
        told, (_, later) = self._told.pop(number), self.prompts[number].from_the_start()
        if turn + 1 >= min(self.config.max_turns, 1 + len(later)):
            return None
        answered = {"role": "assistant", "content": self.base.tokenizer.decode(answer, skip_special_tokens=True).strip()}
        return self._job(number, turn + 1, (*told, answered, {"role": "user", "content": later[turn]}), skipped)

    def record(self, job: Job, answer: list[int]) -> dict[str, Any]:
        """An answer as it is stored."""
        number, turn = self._place(job)
        return {**asdict(job), "category": self.prompts[number].category, "turn": turn, "answer_ids": answer}

    @staticmethod
    def _place(job: Job) -> tuple[int, int]:
        number, turn = job.id.split(":")[0].split("/")
        return int(number), int(turn)

    def _job(self, number: int, turn: int, messages: tuple[Message, ...], skipped: list[str]) -> Job | None:
        """Turn `turn` of conversation `number`; None, and noted, if it has become too long or the template refuses it."""
        job_id = f"{number}/{turn}:{self.prompts[number].id}"
        try:
            ids = encode(self.base.tokenizer, messages)
        except UsageError:
            skipped.append(job_id)
            return None
        # a later turn may be as much longer as the answers before it
        if len(ids) > self.config.max_prompt_tokens + turn * self.config.max_new_tokens:
            skipped.append(job_id)
            return None
        self._told[number] = messages
        return Job(job_id, ids, self.config.temperatures[number % len(self.config.temperatures)])


def _estimate(base: Base, config: DistillConfig, tokens: int, processes: int) -> str:
    """What lies ahead, from a trial of a few tokens."""
    jobs = [Job(str(i), [1 + i % 7] * 16, 0.0) for i in range(config.batch_size)]
    started = time.monotonic()
    trial = continue_all(
        base.model, JobQueue(jobs), eos_ids=set(), batch_size=config.batch_size, max_new_tokens=_TRIAL_TOKENS,
        generator=torch.Generator(base.model.device),
    )  # fmt: skip
    produced = sum(len(answer) for _, answer in trial)
    seconds = (time.monotonic() - started) * tokens / produced
    disk = tokens * processes * 2 * _TOKEN_BYTES  # a prompt is seldom longer than its answer
    return (
        f"{tokens * processes:,} answer tokens to go at most: about {_duration(seconds)}, longer where texts are long, and "
        f"{disk / 2**20:,.1f} MB of disk"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _draw_prompts(base: Base, config: DistillConfig, folder: Path) -> None:
    """Prompts out of the model itself: its chat template opened at the user's turn, at temperature 1."""
    path = folder / "drawn.jsonl"
    drawn = read_jsonl(path)
    opening = encode_user_opening(base.tokenizer)
    jobs = (Job(f"drawn-{i}", opening, 1.0) for i in range(len(drawn), config.self_drawn))
    bar = tqdm(total=config.self_drawn, initial=len(drawn), unit="prompt", desc="prompts drawn")
    with append_jsonl(path) as write, bar:
        for job, ids in continue_all(
            base.model,
            JobQueue(jobs),
            eos_ids=eos_ids(base),
            batch_size=config.batch_size,
            max_new_tokens=_DRAWN_PROMPT_TOKENS,
            generator=torch.Generator(base.model.device).manual_seed(config.seed + 1 + len(drawn)),
        ):
            write({"id": job.id, "prompt": base.tokenizer.decode(ids, skip_special_tokens=True).strip()})
            bar.update()
