"""Levels of a draft tree in two calls of C (drafts.c), where eager ones take some thirty.

Knows: how a recurrent head's weights, and its rows, are handed to C. Does not know: trees, streams, or how weights are trained. Drafts
may be wrong, so that weights are in 8 bits, and rows are rounded to as many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import native
from .projections import Weight, multipliable


class _Recurrent(ctypes.Structure):
    _fields_ = [*((name, Weight) for name in ("recur", "token", "out", "head")), ("scale", ctypes.c_double)]


@dataclass(frozen=True, eq=False)
class FusedLevel:
    """r' = silu(U r + E N(e) + heard), logits = scale * head(s + V r'), N the RMS norm without a weight.

    Attributes:
        told: what C is told of the weights; kept: the tensors that it points to.
        dim, rank, vocab: sizes.
    """

    told: _Recurrent
    kept: list[torch.Tensor]
    dim: int
    rank: int
    vocab: int

    @classmethod
    def of(cls, parts: Sequence[Any], scale: float) -> FusedLevel | None:
        """The modules that multiply with U, E, V, and the head; None if they do so in another way."""
        if not multipliable(parts):
            return None
        recur, token, _, head = parts
        dim, rank, vocab = token.in_features, recur.in_features, head.out_features
        if any(size % native.LANES for size in (rank, vocab)):
            return None
        kept: list[torch.Tensor] = []
        return cls(_Recurrent(*(Weight.of(part, kept) for part in parts), scale), kept, dim, rank, vocab)

    def __call__(
        self, r: torch.Tensor, embedding: torch.Tensor, heard: torch.Tensor, stream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, rank]`, `[rows, dim]`, `[rows, rank]`, `[rows, dim]`, all in float32 -> r' `[rows, rank]`, logits `[rows, vocab]`."""
        r, embedding, heard, stream = (each.contiguous() for each in (r, embedding, heard, stream))
        rows = len(r)
        after, logits = torch.empty(rows, self.rank), torch.empty(rows, self.vocab)
        scratch = torch.empty(rows * (4 * self.dim + 3 * self.rank + 2))
        native.compiled().lossless_level(
            ctypes.byref(self.told), r.data_ptr(), embedding.data_ptr(), heard.data_ptr(), stream.data_ptr(), after.data_ptr(),
            logits.data_ptr(), scratch.data_ptr(), rows, torch.get_num_threads(),
        )  # fmt: skip
        return after, logits


def likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `[rows, vocab]` the `count` best of each row, best first, `[rows, count]`, and their log probabilities."""
    rows, vocab = logits.shape
    if logits.dtype is torch.float32 and logits.device.type == "cpu" and vocab % native.LANES == 0 and native.available():
        logits, numbers, scores = logits.contiguous(), torch.empty(rows, count, dtype=torch.int32), torch.empty(rows, count)
        native.compiled().lossless_likeliest(
            logits.data_ptr(), rows, vocab, count, numbers.data_ptr(), scores.data_ptr(), torch.get_num_threads()
        )
        return numbers, scores
    # the normalizer first: a full log-softmax would write the whole vocabulary once more
    top = logits.topk(count, dim=-1)
    return top.indices, (top.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0)
