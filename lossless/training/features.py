"""What the frozen base says about its own answers: computed once, learnt from many times.

Knows: the main stream's hidden states and top-layer keys and values for one answer. Does not know:
streams' weights, losses, or training order. Nothing here has a gradient, and nothing is written to disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..base.processes import free_memory, tokens_at_once
from ..distillation.answers import Answers
from ..streams.cache import RowCache
from ..streams.runner import StreamRunner


@dataclass(frozen=True)
class Features:
    """The main stream over one prompt and answer of T tokens.

    Attributes:
        ids: `[T]`; prompt: how many of them are the prompt.
        entry: `[T, dim]` at layer N - N_s, where streams start.
        final: `[T, dim]` after the final norm, what the LM head reads.
        keys, values: `[N_s, kv_heads, T, head_dim]` of the top layers.
    """

    ids: torch.Tensor
    prompt: int
    entry: torch.Tensor
    final: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.entry, self.final, self.keys, self.values))


class FeatureStore:
    """Features of a list of answers, computed when first asked for and kept while memory lasts.

    Args:
        runner: the base, installed (its adapter takes no part).
        answers: prompts and answers of the base.
        memory_gb: how much to keep; what does not fit is computed again each time.
        kept: what another store kept of the same answers, for as many top layers; this one adds to it.
    """

    def __init__(self, runner: StreamRunner, answers: Answers, memory_gb: float, kept: dict[int, Features] | None = None) -> None:
        self.runner, self.answers = runner, answers
        self._kept: dict[int, Features] = {} if kept is None else kept
        self._ahead: list[int] = []
        self._room = int(memory_gb * 2**30) - bytes_of(self._kept)

    def __len__(self) -> int:
        return len(self.answers)

    def get(self, numbers: list[int]) -> list[Features]:
        """Features of these answers, in this order; those that are missing are computed together."""
        found = {n: self._kept[n] for n in numbers if n in self._kept}
        missing = [n for n in dict.fromkeys(numbers) if n not in found]
        while missing:
            some = self._at_once(missing)
            missing = missing[len(some) :]
            for number, features in zip(some, self._compute([self.answers[n] for n in some]), strict=True):
                found[number] = features
                self._keep(number, features)
        return [found[n] for n in numbers]

    def _at_once(self, numbers: list[int]) -> list[int]:
        """The first of these answers that fit into a pass together, padded; one at least."""
        widest, most = 0, tokens_at_once(self.runner.model.device)
        for count, number in enumerate(numbers):
            widest = max(widest, len(self.answers[number]["prompt_ids"]) + len(self.answers[number]["answer_ids"]))
            if count and (count + 1) * widest > most:
                return numbers[:count]
        return numbers

    def read_ahead(self, numbers: list[int]) -> None:
        """Have the features of these answers at hand, as far as memory allows; told the same again, it does nothing."""
        if numbers != self._ahead:
            self._ahead, left = numbers, numbers
            while left:  # a pass at a time: no more is held at once than is kept
                some = self._at_once(left)
                self.get(some)
                left = left[len(some) :]

    def _keep(self, number: int, features: Features) -> None:
        """What has been kept longest makes room."""
        while self._kept and self._room < features.bytes:
            self._room += self._kept.pop(next(iter(self._kept))).bytes
        if features.bytes <= self._room:
            self._room -= features.bytes
            self._kept[number] = features

    @torch.no_grad()
    def _compute(self, records: list[dict[str, Any]]) -> list[Features]:
        texts = [record["prompt_ids"] + record["answer_ids"] for record in records]
        device = self.runner.model.device
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long, device=device)
        for row, text in zip(ids, texts, strict=True):  # padded on the right, where causal rows do not look
            row[: len(text)] = torch.tensor(text, device=device)
        cache = RowCache(len(self.runner.layers), ids.shape[1], keep_from=self.runner.first_top)
        entry, final = self.runner.observe(ids, cache)
        top = cache.rows[-len(self.runner.top) :]
        # copies, not views of the whole batch; bfloat16 keeps the range of the residual stream at half the memory; drafts need no more
        return [
            Features(
                ids=ids[i, : len(text)].clone(),
                prompt=len(record["prompt_ids"]),
                entry=entry[i, : len(text)].bfloat16().clone(),
                final=final[i, : len(text)].bfloat16().clone(),
                keys=torch.stack([layer.keys[i, :, : len(text)] for layer in top]).bfloat16(),
                values=torch.stack([layer.values[i, :, : len(text)] for layer in top]).bfloat16(),
            )
            for i, (record, text) in enumerate(zip(records, texts, strict=True))
        ]


def bytes_of(kept: dict[int, Features]) -> int:
    return sum(features.bytes for features in kept.values())


def affordable(wanted_gb: float, device: torch.device, besides_gb: float = 0.0, kept_bytes: int = 0) -> float:
    """GiB of features to keep on a device: at most half of the memory that nothing else needs.

    Args:
        besides_gb: what something else will take; kept_bytes: features that are there already, and may stay.
    """
    return min(wanted_gb, max(0.0, free_memory(device) + kept_bytes / 2**30 - besides_gb) / 2)


class FixedRows:
    """Stands in for a cache in the top layers: main keys that are given, one for each place of a text,
    followed by a pass's own.

    keys, values: `[N_s, batch, kv_heads, T, head_dim]`; `first` is the number of the lowest top layer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        self.keys, self.values, self.first = keys, values, first

    def places(self) -> torch.Tensor:
        return torch.arange(self.keys.shape[3], device=self.keys.device)[None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = layer - self.first
        return torch.cat([self.keys[own], keys], dim=2), torch.cat([self.values[own], values], dim=2)


@dataclass(frozen=True)
class TrainBatch:
    """A run of positions of several answers, padded to one shape, ready for `StreamRunner.speculate`.

    Attributes:
        entry: `[batch, positions, dim]`; positions: `[batch, positions]`, each row's place in its text.
        context: `[batch, positions, T]`, the main keys each may attend to; rows: those keys.
        tokens: `[batch, positions, gamma]`, x_{t+1} .. x_{t+gamma}, which the transition is told.
        final: `[batch, positions + gamma - 1, dim]`, the base after x_{t+1} of the first position and of
            each that follows: stream j of position number p learns from number p + j - 1.
        valid: `[batch, positions, gamma]`, whether the answer has a token t + 1 + j.
    """

    entry: torch.Tensor
    positions: torch.Tensor
    context: torch.Tensor
    rows: FixedRows
    tokens: torch.Tensor
    final: torch.Tensor
    valid: torch.Tensor


def make_batch(features: list[Features], starts: list[int], count: int, gamma: int, first_layer: int, dtype: torch.dtype) -> TrainBatch:
    """Gather `count` positions of each answer from its `starts` on (fewer where the answer ends)."""
    batch, width = len(features), max(len(f.ids) for f in features)
    device = features[0].ids.device
    keys = torch.zeros(features[0].keys.shape[0], batch, *features[0].keys.shape[1:2], width, features[0].keys.shape[3],
                       dtype=dtype, device=device)  # fmt: skip
    values = torch.zeros_like(keys)
    lengths = torch.tensor([len(f.ids) for f in features], device=device)
    for i, f in enumerate(features):
        keys[:, i, :, : len(f.ids)], values[:, i, :, : len(f.ids)] = f.keys, f.values
    positions = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)  # [batch, positions]
    ahead = positions[:, :, None] + torch.arange(1, gamma + 1, device=device)  # [batch, positions, gamma]
    valid = ahead + 1 < lengths[:, None, None]
    inside = torch.minimum(positions, lengths[:, None] - 1)
    ahead = torch.minimum(ahead, lengths[:, None, None] - 1)
    targets = torch.cat([ahead[:, :, 0], ahead[:, -1, 1:]], dim=1)
    return TrainBatch(
        entry=torch.stack([f.entry[p] for f, p in zip(features, inside, strict=True)]).to(dtype),
        positions=inside,
        context=torch.arange(width, device=device) <= inside[:, :, None],
        rows=FixedRows(keys, values, first_layer),
        tokens=torch.stack([f.ids[a] for f, a in zip(features, ahead, strict=True)]),
        final=torch.stack([f.final[t] for f, t in zip(features, targets, strict=True)]).to(dtype),
        valid=valid,
    )
