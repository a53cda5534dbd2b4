"""Self-distillation data: the frozen model's own answers to many prompts.

Knows: batched generation with the base alone, and a folder of answers that can be taken up again
after an interruption. Does not know: adapters or training. It stores token ids only; the base's
distributions are computed again when they are learnt from.

A folder holds `distill.json` (what was asked for, of which base) and `answers.jsonl`, one line an
answer: `id, temperature, prompt_ids, answer_ids`; and `drawn.jsonl`, the prompts that the model drew
itself, if it did.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .cache import RowCache
from .errors import UsageError
from .models import Base, fingerprint, fingerprint_differences
from .prompts import Prompt, encode, encode_user_opening, from_text
from .storage import append_jsonl, read_jsonl, versions, write_json

_REFILL_SHARE = 8  # refill when one slot in this many is free, so that prompts are read in batches
_PREFILL_TOKENS = 2048  # a group of prompts read at once: larger ones fall out of the caches of a CPU
_DRAWN_PROMPT_TOKENS = 96


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


@dataclass(frozen=True)
class Job:
    """One sequence to continue: token ids, and the temperature to do it at."""

    id: str
    prompt_ids: list[int]
    temperature: float


@dataclass
class _Slot:
    """A row of the running batch; a slot without a job is idle and its row masked."""

    job: Job | None = None
    answer: list[int] = field(default_factory=list)

    @property
    def temperature(self) -> float:
        return self.job.temperature if self.job else 0.0


def continue_all(
    model: Any,
    jobs: Iterable[Job],
    *,
    eos_ids: set[int],
    batch_size: int,
    max_new_tokens: int,
    generator: torch.Generator,
) -> Iterator[tuple[Job, list[int]]]:
    """Continue every job with the base alone, yielding each as it finishes.

    The batch stays full: when enough rows have finished, waiting prompts take their places.

    Yields:
        (job, answer ids): the ids end with an EOS id unless `max_new_tokens` came first.
    """
    waiting = iter(jobs)
    batch = _Batch(model, batch_size, generator)
    exhausted = False
    while True:
        idle = batch.idle()
        if not exhausted and len(idle) * _REFILL_SHARE >= batch_size:
            fresh = list(itertools.islice(waiting, len(idle)))
            exhausted = len(fresh) < len(idle)
            batch.fill(idle, fresh)
        elif len(idle) < len(batch.slots):
            batch.step()
        else:
            return
        for slot in batch.slots:
            if slot.job and (slot.answer[-1] in eos_ids or len(slot.answer) >= max_new_tokens):
                yield slot.job, slot.answer
                slot.job = None
        if exhausted and 2 * len(batch.idle()) > len(batch.slots):
            batch.drop_idle()


class _Batch:
    """Rows that are decoded together: their slots, their cache and their mask.

    All rows share one column counter, the cache's length. A row's own columns are those that its mask
    names, so a newcomer's prompt is written right up to the current column, into a row that has become
    free; nothing is copied but that prompt.
    """

    def __init__(self, model: Any, size: int, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator
        self.slots = [_Slot() for _ in range(size)]
        self.cache = self._new_cache()
        self.mask = torch.zeros(size, 0, dtype=torch.long, device=model.device)  # [batch, columns]

    def _new_cache(self) -> RowCache:
        return RowCache(self.model.config.get_text_config().num_hidden_layers, capacity=512)

    def idle(self) -> list[int]:
        """Numbers of the slots that wait for a job."""
        return [i for i, slot in enumerate(self.slots) if slot.job is None]

    def fill(self, rows: list[int], jobs: list[Job]) -> None:
        """Give idle rows a job each, reading the prompts in groups of like length."""
        self._release(rows)
        order = sorted(jobs, key=lambda job: len(job.prompt_ids))
        while order:
            width = len(order[-1].prompt_ids)
            group = [order.pop() for _ in range(min(len(order), max(1, _PREFILL_TOKENS // width)))]
            taken, rows = rows[: len(group)], rows[len(group) :]
            self._prefill(taken, group, width)

    def _prefill(self, rows: list[int], jobs: list[Job], width: int) -> None:
        ids = torch.zeros(len(jobs), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, job in enumerate(jobs):
            ids[i, width - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
            mask[i, width - len(job.prompt_ids) :] = 1
        ids, mask = ids.to(self.mask.device), mask.to(self.mask.device)
        cache = self._new_cache()
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), cache)
        if width > self.cache.length:
            self._shift(width - self.cache.length, cache)
        columns = slice(self.cache.length - width, self.cache.length)
        for layer, new in zip(self.cache.rows, cache.rows, strict=True):
            layer.keys[rows, :, columns] = new.keys[:, :, :width]
            layer.values[rows, :, columns] = new.values[:, :, :width]
        self.mask[rows, columns] = mask
        for row, job in zip(rows, jobs, strict=True):
            self.slots[row] = _Slot(job)
        self._append(rows, logits)

    def step(self) -> None:
        """One more token for every row that has a job."""
        last = torch.tensor([[slot.answer[-1] if slot.answer else 0] for slot in self.slots], device=self.mask.device)
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(last)], dim=1)
        logits = self._forward(last, self.mask, positions, self.cache)
        self._append([i for i, slot in enumerate(self.slots) if slot.job], logits)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: RowCache
    ) -> torch.Tensor:
        """Logits of the last column, `[rows, vocab]`; all columns stay in the cache."""
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        cache.keep(range(ids.shape[1]))
        return logits[:, -1].float()

    def _append(self, rows: list[int], logits: torch.Tensor) -> None:
        """Choose a token for these rows; `logits` holds a row for each of them, or for every slot."""
        if len(logits) != len(rows):
            logits = logits[rows]
        chosen = logits.argmax(-1)
        heat = torch.tensor([self.slots[row].temperature for row in rows], device=logits.device)
        hot = (heat > 0).nonzero()[:, 0]
        if len(hot):
            # by inverse distribution: one uniform number a row, where multinomial draws one a word
            mass = torch.softmax(logits[hot] / heat[hot, None], dim=-1).cumsum(-1)
            point = torch.rand(len(hot), 1, device=logits.device, generator=self.generator) * mass[:, -1:]
            chosen[hot] = torch.searchsorted(mass, point, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            self.slots[row].answer.append(token)

    def _release(self, rows: list[int]) -> None:
        """Mask idle rows, and move everything left by the columns that no row uses any more."""
        self.mask[rows] = 0
        if self.mask.shape[1]:
            used = self.mask.any(0)
            self._shift(-(int(used.int().argmax()) if used.any() else len(used)))

    def _shift(self, columns: int, like: RowCache | None = None) -> None:
        """Move all columns right (or left, if negative) in place; `like` gives an empty cache its shape."""
        length = self.cache.length
        for i, layer in enumerate(self.cache.rows):
            if not layer.is_initialized and like is not None:
                shape = (len(self.slots), *like.rows[i].keys.shape[1:])
                layer.lazy_initialization(like.rows[i].keys.new_empty(shape), like.rows[i].values.new_empty(shape))
            layer.reserve(length + columns)
            for store in (layer.keys, layer.values):
                if columns > 0:
                    store[:, :, columns : length + columns] = store[:, :, :length].clone()
                    store[:, :, :columns] = 0
                elif columns < 0:
                    store[:, :, : length + columns] = store[:, :, -columns:length].clone()
            layer.length = length + columns
        kept = self.mask[:, -columns:] if columns < 0 else self.mask
        self.mask = torch.cat([kept.new_zeros(len(self.slots), max(columns, 0)), kept], dim=1)

    def drop_idle(self) -> None:
        """Shrink to the rows that still have a job, when no prompt waits for a place."""
        busy = [i for i, slot in enumerate(self.slots) if slot.job]
        self.slots = [self.slots[i] for i in busy]
        self.mask = self.mask[busy]
        for layer in self.cache.rows:
            layer.keys, layer.values = layer.keys[busy], layer.values[busy]


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
        if len(window) >= 2 * config.batch_size:
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
