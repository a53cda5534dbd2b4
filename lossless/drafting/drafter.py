"""Drafting: from the streams of the accepted node to a tree under the certain token.

Knows: the transition head, the draft vocabulary, and how a level of a tree is read off the streams, with sampling noise that
was looked at ahead. Does not know: verification, caches, or how the streams came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn import functional as F

from ..adapter.weights import StreamAdapter
from ..base.drafts import table_of
from ..base.linears import Int8Linear, draft_linear
from ..kernels.pages import own_pages
from .builder import TreeBuilder
from .costs import CostCurve
from .levels import FusedLevels, GraphedLevels, Levels
from .ngram import NGramCache
from .noise import NoiseBias
from .pruning import worth_streams
from .tree import DraftTree

_ANY_DEPTH = 2**31


class Drafter:
    """Reads token distributions off the streams.

    Args:
        adapter: transition head and draft vocabulary.
        embeddings: the base's input embeddings; head: its LM head; scale: what the base multiplies that one's logits with.
    """

    def __init__(self, adapter: StreamAdapter, embeddings: Any, head: nn.Module, scale: float = 1.0) -> None:
        self.adapter, self.embeddings, self.head, self.scale = adapter, embeddings, head, scale
        self._rows: torch.Tensor | None = None
        self._head: nn.Module | None = None
        self._numbers: torch.Tensor | None = None  # [vocab], places in the draft vocabulary
        with align_module_device(head):  # Accelerate may keep the weight elsewhere
            weight = getattr(head, "weight", None)
            if adapter.draft_ids is not None and weight is not None and weight.is_floating_point():
                self._rows = _gathered(weight.detach(), adapter.draft_ids)  # [draft vocabulary, dim]
        learning = any(parameter.requires_grad for parameter in adapter.parameters())
        if self._rows is not None and not learning:  # drafts need no bits
            self._head, self._rows = draft_linear(self._rows, None, self._rows.dtype), None
        self._levels: GraphedLevels | None = None  # on a GPU
        self._fused = None if self._head is None else adapter.transition.fused(self._head, scale, adapter.draft_ids)
        self._table = None if self._fused is None else table_of(embeddings)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., draft vocabulary]`, in float32."""
        ids = self.adapter.draft_ids
        hidden = hidden.contiguous()  # of a slice torch would multiply each text with a copy of the weight
        if self._head is not None:
            rows = hidden.float() if isinstance(self._head, Int8Linear) else hidden
            return self._scaled(self._head(rows).float())
        if self._rows is not None:
            return self._scaled(F.linear(hidden.to(self._rows.dtype), self._rows).float())
        full = self.head(hidden)
        return self._scaled((full if ids is None else full[..., ids]).float())

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.scale == 1.0 else logits * self.scale

    def token_ids(self, drafted: torch.Tensor) -> torch.Tensor:
        """Numbers in the draft vocabulary -> token ids."""
        return drafted if self.adapter.draft_ids is None else self.adapter.draft_ids[drafted]

    def worth_streams(self, exits: torch.Tensor, trees: Sequence[DraftTree], floor: float, noise_bias: NoiseBias | None = None) -> torch.Tensor:
        """`[m]`, the rows of a pass over these trees that speculate; exits: `[batch, rows, dim]`, what the LM head reads
        of the early exit; noise_bias: that which the trees were grown with."""
        if self._numbers is None and self.adapter.draft_ids is not None:
            ids = self.adapter.draft_ids
            self._numbers = torch.full((len(self.embeddings.weight),), -1, device=ids.device)
            self._numbers[ids] = torch.arange(len(ids), device=ids.device)
        logits = self.logits(exits)
        if noise_bias is not None:
            depths = [tree.depths for tree in trees]
            for ahead in range(self.adapter.config.num_streams):
                places = [(text, row) for text, own in enumerate(depths) for row, depth in enumerate(own) if depth == ahead]
                texts, rows = torch.tensor(places, dtype=torch.long, device=logits.device).reshape(-1, 2).unbind(1)
                logits[texts, rows] = noise_bias.perturb(logits[texts, rows], texts, ahead, self.adapter.draft_ids)
        return torch.tensor(worth_streams(logits, trees, self._numbers, floor))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings(ids).to(self.adapter.device)

    def trees(
        self,
        streams: torch.Tensor | None,
        roots: Sequence[int],
        max_nodes: int,
        ngrams: Sequence[NGramCache | None],
        noise_bias: NoiseBias | None = None,
        depths: Sequence[int] | None = None,
        curve: CostCurve | None = None,
    ) -> list[DraftTree]:
        """For each sequence, the tree that fits: of paths that are jointly most likely, of at most `max_nodes` nodes.

        Args:
            streams: `[batch, num_streams, dim]` of the accepted nodes, stream j gives the nodes of depth j; None: only the
                n-grams draft.
            ngrams: of each text up to its root.
            noise_bias: of these texts, for as many positions as there are streams; None if decoding is greedy.
            depths: of each tree at most, where a text is about to end.
            curve: what rows cost here; None: trees are full.
        """
        if max_nodes == 1:
            return [DraftTree((root,), (-1,)) for root in roots]
        depths = depths or [_ANY_DEPTH] * len(roots)
        builders = [TreeBuilder(max_nodes, ngrams, depth, curve) for ngrams, depth in zip(ngrams, depths, strict=True)]
        if streams is not None:
            self._grow(builders, streams, roots, noise_bias)
        return [builder.finish(root) for builder, root in zip(builders, roots, strict=True)]

    def _grow(self, builders: list[TreeBuilder], streams: torch.Tensor, roots: Sequence[int], noise_bias: NoiseBias | None) -> None:
        """Levels of drafts, as many as there are streams or are worth it; one product for all nodes of a level."""
        levels: Levels | FusedLevels | GraphedLevels
        if len(roots) == 1 and streams.is_cuda:
            levels = self._graphed(builders[0]).begin(streams, noise_bias)
        elif self._fused is not None:
            levels = FusedLevels(self, self._fused, self._table, streams, noise_bias)
        else:
            levels = Levels(self, streams, noise_bias)
        chosen: list[int] = []
        tokens = list(roots)
        for j in range(self.adapter.config.num_streams):
            if not any(builder.worth_a_level() for builder in builders):
                break
            likely = iter(levels.read(j, chosen, tokens))
            first, chosen = 0, []
            for builder in builders:
                count = len(builder.frontier)
                builder.levels += bool(count)
                chosen += [first + row for row in builder.grow([next(likely) for _ in range(count)])]
                first += count
            if not chosen:
                break
            tokens = [path[-1] for builder in builders for path in builder.paths]

    def _graphed(self, builder: TreeBuilder) -> GraphedLevels:
        """Captured levels for frontiers as large as this tree's."""
        if self._levels is None or self._levels.most < builder.widest:
            self._levels = GraphedLevels(self, builder.widest)
        return self._levels

    def top_k(self, vocab: int) -> int:
        """How many tokens are looked at behind each node, of a draft vocabulary of so many."""
        return min(self.adapter.config.drafting.tree_top_k, vocab)


def _gathered(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a weight."""
    if weight.device.type != "cpu":
        return weight[rows].contiguous()
    return torch.index_select(weight, 0, rows, out=own_pages(len(rows), weight.shape[1], dtype=weight.dtype))
