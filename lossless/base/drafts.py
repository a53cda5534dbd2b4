"""Levels of a draft tree in one call of C (drafts.c), where eager ones take some thirty.

Knows: how a recurrent head's weights, and its rows, are handed to C. Does not know: trees, streams, or how weights are trained. Drafts
may be wrong, so that weights are in 8 bits, and rows are rounded to as many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels import native
from .projections import Weight, multipliable
from .structure import listeners


class _Recurrent(ctypes.Structure):
    _fields_ = [
        *((name, Weight) for name in ("recur", "token", "out", "head", "start", "stream")), ("scale", ctypes.c_double), ("ids", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class FusedLevel:
    """r' = silu(U r + E N(e) + heard), logits = scale * head(s + V r'), N the RMS norm without a weight; before the first level
    r = tanh(A N(s_1)), heard = S N(s) + b.

    Attributes:
        told: what C is told of the weights; kept: the tensors that it points to.
        dim, rank, vocab: sizes, the last that of the draft vocabulary.
    """

    told: _Recurrent
    kept: list[torch.Tensor]
    dim: int
    rank: int
    vocab: int

    @classmethod
    def of(cls, parts: Sequence[Any], bias: torch.Tensor, scale: float, ids: torch.Tensor | None = None) -> FusedLevel | None:
        """The modules that multiply with U, E, V, the head, A and S, b `[levels, rank]`, and the tokens that logits are of; None if they do so in
        another way."""
        if not multipliable(parts):
            return None
        recur, token, _, head, *_ = parts
        dim, rank, vocab = token.in_features, recur.in_features, head.out_features
        if any(size % native.LANES for size in (rank, vocab)):
            return None
        kept: list[torch.Tensor] = []
        weights = [Weight.of(part, kept) for part in parts]
        kept.append(bias.detach().float().contiguous())
        told = _Recurrent(*weights, scale, None, kept[-1].data_ptr())
        if ids is not None:
            kept.append(ids.long().contiguous())
            told.ids = kept[-1].data_ptr()
        return cls(told, kept, dim, rank, vocab)

    def begin(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `[texts, levels, dim]`, float32: r `[texts, rank]` and heard `[texts, levels, rank]`."""
        texts, levels, _ = streams.shape
        r, heard = native.room(texts, self.rank), native.room(texts, levels, self.rank)
        scratch = native.room(texts * (levels + 1) * (2 * self.dim + 1))
        native.compiled().lossless_hear(
            ctypes.byref(self.told), streams.data_ptr(), texts, levels, r.data_ptr(), heard.data_ptr(), scratch.data_ptr(), torch.get_num_threads()
        )
        return r, heard

    def __call__(
        self, of: torch.Tensor, r: torch.Tensor, embeddings: torch.Tensor, heard: torch.Tensor, streams: torch.Tensor, ahead: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A level of a tree, or of one for each of several texts.

        Args:
            of: `[3, nodes]`, each node's place among the embeddings, that of its parent in r, and its text.
            r: `[parents, rank]`; embeddings: `[any, dim]`, of a dtype that has kernels, all others float32.
            heard: `[texts, levels, rank]`; streams: `[texts, levels, dim]`; ahead: the level, from 0.
            count: of likely tokens.

        Returns:
            r' `[nodes, rank]`, logits `[nodes, vocab]`, and of each node the likeliest tokens, best first, and their log probabilities, both
            `[nodes, count]`.
        """
        nodes, levels = of.shape[1], heard.shape[1]
        after, logits = native.room(nodes, self.rank), native.room(nodes, self.vocab)
        tokens, scores = native.room(nodes, count, dtype=torch.int32), native.room(nodes, count)
        scratch = native.room(nodes * 3 * (self.dim + self.rank + 1))
        native.compiled().lossless_level(
            ctypes.byref(self.told), of.data_ptr(), r.data_ptr(), embeddings.data_ptr(), native.KINDS[embeddings.dtype],
            heard.data_ptr() + 4 * ahead * self.rank, streams.data_ptr() + 4 * ahead * self.dim, levels, after.data_ptr(), logits.data_ptr(),
            tokens.data_ptr(), scores.data_ptr(), count, scratch.data_ptr(), nodes, torch.get_num_threads(),
        )  # fmt: skip
        return after, logits, tokens, scores


def table_of(embeddings: Any) -> torch.Tensor | None:
    """`[vocab, dim]` of a dtype that has kernels on the CPU, of embeddings that are looked up and nothing else; None of any other."""
    if type(embeddings) is not nn.Embedding or listeners(embeddings) or embeddings.max_norm is not None:
        return None
    weight = embeddings.weight
    if type(weight.data) is not torch.Tensor or weight.device.type != "cpu" or not (native.available() and native.has_kernels(weight.dtype)) or not weight.is_contiguous():
        return None
    return weight.detach()


def likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `[rows, vocab]` the `count` best of each row, best first, `[rows, count]`, and their log probabilities."""
    rows, vocab = logits.shape
    if logits.dtype is torch.float32 and logits.device.type == "cpu" and vocab % native.LANES == 0 and native.available():
        logits, numbers, scores = logits.contiguous(), native.room(rows, count, dtype=torch.int32), native.room(rows, count)
        native.compiled().lossless_likeliest(
            logits.data_ptr(), rows, vocab, count, numbers.data_ptr(), scores.data_ptr(), torch.get_num_threads()
        )
        return numbers, scores
    # the normalizer first: a full log-softmax would write the whole vocabulary once more
    top = logits.topk(count, dim=-1)
    return top.indices, (top.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0)
