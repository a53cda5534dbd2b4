"""Batched continuation with the base alone, the batch kept full.

Knows: slots, columns and masks of a running batch, and how a waiting prompt takes a free row's place.
Does not know: what the prompts are, or what becomes of the answers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..base.layers import CACHE
from ..base.processes import tokens_at_once
from ..streams.cache import RowCache

_REFILL_SHARE = 8  # refill when one slot in this many is free, so that prompts are read in batches
_FIRST_COLUMNS = 512  # room of a batch before it grows


@dataclass(frozen=True)
class Job:
    """One sequence to continue: token ids, and the temperature to do it at."""

    id: str
    prompt_ids: list[int]
    temperature: float


class JobQueue:
    """Jobs that wait: those put back in line first, then the rest, which are made when they are asked for."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = iter(jobs)
        self._first: deque[Job] = deque()

    def put(self, job: Job) -> None:
        """What follows from an answer: a conversation's next turn."""
        self._first.append(job)

    def take(self, count: int) -> list[Job]:
        taken = [self._first.popleft() for _ in range(min(count, len(self._first)))]
        return taken + list(itertools.islice(self._jobs, count - len(taken)))


@dataclass
class _Slot:
    """A row of the running batch; a slot without a job is idle and its row masked."""

    job: Job | None = None
    answer: list[int] = field(default_factory=list)

    @property
    def temperature(self) -> float:
        return self.job.temperature if self.job else 0.0


@contextlib.contextmanager
def continue_all(
    model: Any,
    queue: JobQueue,
    *,
    eos_ids: set[int],
    batch_size: int,
    max_new_tokens: int,
    generator: torch.Generator,
) -> Iterator[Iterator[tuple[Job, list[int]]]]:
    """Continue every job with the base alone: gives what tells each as it finishes. Behind this the base is as it was, whoever broke off.

    The batch stays full: when enough rows have finished, waiting jobs take their places. Whoever is given an answer may
    put more jobs into the queue.

    Yields:
        an iterator of (job, answer ids): the ids end with an EOS id unless `max_new_tokens` came first.
    """
    with _dense_rows(model.get_output_embeddings()):
        yield _keep_full(_Batch(model, batch_size, generator), queue, eos_ids, max_new_tokens)


@contextlib.contextmanager
def _dense_rows(head: torch.nn.Module) -> Iterator[None]:
    """The LM head is given rows that lie side by side: of a slice torch would multiply each row by a weight of its own,
    copied for it, which takes longer than all the layers below."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _keep_full(
    batch: _Batch, queue: JobQueue, eos_ids: set[int], max_new_tokens: int
) -> Generator[tuple[Job, list[int]], None, None]:
    while True:
        idle = batch.idle()
        fresh = queue.take(len(idle)) if len(idle) * _REFILL_SHARE >= len(batch.slots) else []
        if fresh:
            batch.fill(idle, fresh)
        elif len(idle) < len(batch.slots):
            if len(idle) * 2 > len(batch.slots):  # nobody waits: go on with fewer rows
                batch.drop_idle()
            batch.step()
        else:
            return
        for slot in list(batch.slots):
            if slot.job and (slot.answer[-1] in eos_ids or len(slot.answer) >= max_new_tokens):
                job, slot.job = slot.job, None
                yield job, slot.answer


class _Batch:
    """Rows that are decoded together: their slots, their cache and their mask.

    All rows share one column counter, the cache's length. A row's own columns are those that its mask
    names, so a newcomer's prompt is written right up to the current column, into a row that has become
    free; nothing is copied but that prompt.
    """

    def __init__(self, model: Any, size: int, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator
        self.slots = [_Slot() for _ in range(size)]
        self.cache = self._new_cache(_FIRST_COLUMNS)
        self.mask = torch.zeros(size, 0, dtype=torch.long, device=model.device)  # [batch, columns]

    def _new_cache(self, columns: int) -> RowCache:
        return RowCache(self.model.config.get_text_config().num_hidden_layers, capacity=columns)

    def idle(self) -> list[int]:
        """Numbers of the slots that wait for a job."""
        return [i for i, slot in enumerate(self.slots) if slot.job is None]

    def fill(self, rows: list[int], jobs: list[Job]) -> None:
        """Give idle rows a job each, reading the prompts in groups of like length."""
        self._release(rows)
        order = sorted(jobs, key=lambda job: len(job.prompt_ids))
        while order:
            width = len(order[-1].prompt_ids)
            group = [order.pop() for _ in range(min(len(order), max(1, tokens_at_once(self.mask.device) // width)))]
            taken, rows = rows[: len(group)], rows[len(group) :]
            self._prefill(taken, group, width)

    def _prefill(self, rows: list[int], jobs: list[Job], width: int) -> None:
        ids = torch.zeros(len(jobs), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, job in enumerate(jobs):
            ids[i, width - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
            mask[i, width - len(job.prompt_ids) :] = 1
        ids, mask = ids.to(self.mask.device), mask.to(self.mask.device)
        cache = self._new_cache(width)
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
            **{CACHE: cache},
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
