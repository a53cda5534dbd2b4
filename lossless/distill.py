"""Self-distillation data: the frozen model's own answers to many prompts.

Knows: which prompts are answered how, and a folder of answers that can be taken up again after an
interruption. Does not know: how a batch is decoded, adapters, or training. It stores token ids only; the base's
distributions are computed again when they are learnt from.

A folder holds `distill.json` (what was asked for, of which base) and `answers.jsonl`, one line an
answer: `id, temperature, prompt_ids, answer_ids`; and `drawn.jsonl`, the prompts that the model drew
itself, if it did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .batch import Job, continue_all
from .errors import UsageError
from .models import Base, fingerprint, fingerprint_differences
from .prompts import Prompt, encode, encode_user_opening, from_text
from .storage import append_jsonl, read_jsonl, versions, write_json

_DRAWN_PROMPT_TOKENS = 96
_LENGTH_WINDOW = 16  # batches of prompts sorted together: rows of like length share one cache without much padding


@dataclass(frozen=True)
class DistillConfig:
    """What to ask of the base. Prompt number i is answered at `temperatures[i % len]` (0 is greedy)."""

    answer_tokens: int = 600_000
    max_new_tokens: int = 256
    max_prompt_tokens: int = 384
    batch_size: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    self_drawn: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("answer_tokens", "max_new_tokens", "max_prompt_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.self_drawn < 0:
            raise UsageError(f"self_drawn must be at least 0, got {self.self_drawn}")
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

    Running it again with the same arguments goes on where it stopped.

    Returns:
        The summary that is also written into `distill.json`: answers, prompt and answer tokens.

    Raises:
        UsageError: the folder was begun with other settings or another base, or there are no prompts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": base.name, "config": json.loads(json.dumps(asdict(config)))}
    settings["fingerprint"] = fingerprint(base.model, base.tokenizer)
    _check_same_job(folder, settings)
    write_json(folder / "distill.json", settings | {"versions": versions(), "complete": False})
    if config.self_drawn:
        prompts = _draw_prompts(base, config, folder) + list(prompts)
    if not prompts:
        raise UsageError("there are no prompts: name a prompt file, or let the model draw some (self_drawn)")

    done = read_jsonl(folder / "answers.jsonl")
    finished = {record["id"] for record in done}
    tokens = sum(len(record["answer_ids"]) for record in done)
    started, began_with = time.monotonic(), tokens
    skipped: list[str] = []
    bar = tqdm(total=config.answer_tokens, initial=min(tokens, config.answer_tokens), unit="tok", desc="answers")
    with append_jsonl(folder / "answers.jsonl") as write, bar:
        jobs = _answer_jobs(base, prompts, config, finished, skipped)
        generator = torch.Generator(base.model.device).manual_seed(config.seed + len(done))
        if tokens < config.answer_tokens:
            for job, answer in continue_all(
                base.model,
                jobs,
                eos_ids=eos_ids(base),
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                generator=generator,
            ):
                write({**asdict(job), "answer_ids": answer})
                tokens += len(answer)
                bar.update(len(answer))
                if tokens >= config.answer_tokens:
                    break
    records = read_jsonl(folder / "answers.jsonl")
    summary = {
        "answers": len(records),
        "answer_tokens": sum(len(r["answer_ids"]) for r in records),
        "prompt_tokens": sum(len(r["prompt_ids"]) for r in records),
        "prompts_too_long": len(skipped),
        "answer_tokens_per_s": round((tokens - began_with) / max(time.monotonic() - started, 1e-9), 1),
    }
    write_json(folder / "distill.json", settings | {"versions": versions(), "complete": True, **summary})
    return summary


def _check_same_job(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "distill.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = fingerprint_differences(before["fingerprint"], settings["fingerprint"])
    # asking for more tokens than before goes on with the same data
    differing = [k for k in settings["config"] if k != "answer_tokens" and before["config"].get(k) != settings["config"][k]]
    if other or differing:
        raise UsageError(
            f"{folder} was begun with other settings ({', '.join(differing + other)}): "
            "use them again to go on, or another folder to start anew"
        )


def _answer_jobs(
    base: Base, prompts: list[Prompt], config: DistillConfig, finished: set[str], skipped: list[str]
) -> Iterator[Job]:
    """The jobs that remain, windows of them sorted by length so that little of a batch is padding."""
    window: list[Job] = []
    for number, prompt in enumerate(prompts):
        job_id = f"{number}:{prompt.id}"
        if job_id in finished:
            continue
        ids = encode(base.tokenizer, prompt.messages)
        if len(ids) > config.max_prompt_tokens:
            skipped.append(job_id)
            continue
        window.append(Job(job_id, ids, config.temperatures[number % len(config.temperatures)]))
        if len(window) >= _LENGTH_WINDOW * config.batch_size:
            yield from sorted(window, key=lambda job: len(job.prompt_ids))
            window = []
    yield from sorted(window, key=lambda job: len(job.prompt_ids))


def _draw_prompts(base: Base, config: DistillConfig, folder: Path) -> list[Prompt]:
    """Prompts out of the model itself: its chat template opened at the user's turn, at temperature 1."""
    path = folder / "drawn.jsonl"
    drawn = read_jsonl(path)
    opening = encode_user_opening(base.tokenizer)
    jobs = (Job(f"drawn-{i}", opening, 1.0) for i in range(len(drawn), config.self_drawn))
    bar = tqdm(total=config.self_drawn, initial=len(drawn), unit="prompt", desc="prompts drawn")
    with append_jsonl(path) as write, bar:
        for job, ids in continue_all(
            base.model,
            jobs,
            eos_ids=eos_ids(base),
            batch_size=config.batch_size,
            max_new_tokens=_DRAWN_PROMPT_TOKENS,
            generator=torch.Generator(base.model.device).manual_seed(config.seed + 1 + len(drawn)),
        ):
            write({"id": job.id, "prompt": base.tokenizer.decode(ids, skip_special_tokens=True).strip()})
            bar.update()
    return [from_text(r["prompt"], r["id"]) for r in read_jsonl(path) if r["prompt"]]
