"""Drafting: from the streams of the accepted node to a tree under the certain token.

Knows: the transition head, the draft vocabulary, and how a tree is grown level by level, from the streams
and from what the text itself recalls. Does not know: verification, caches, or how the streams came about.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .adapter import StreamAdapter
from .lookup import TextMemory
from .tree import Candidate, DraftTree, blend, most_likely, plant


class Drafter:
    """Reads token distributions off the streams.

    Args:
        adapter: transition head and draft vocabulary.
        embeddings: the base's input embeddings; head: its LM head.
    """

    def __init__(self, adapter: StreamAdapter, embeddings: nn.Module, head: nn.Module) -> None:
        self.adapter, self.embeddings, self.head = adapter, embeddings, head
        weight = getattr(head, "weight", None)
        self._rows: torch.Tensor | None = None
        if adapter.draft_ids is not None and weight is not None and weight.is_floating_point():
            self._rows = weight.detach()[adapter.draft_ids].contiguous()  # [draft vocabulary, dim]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., draft vocabulary]`, in float32."""
        ids = self.adapter.draft_ids
        if self._rows is not None:
            return F.linear(hidden.to(self._rows.dtype), self._rows).float()
        full = self.head(hidden)
        return (full if ids is None else full[..., ids]).float()

    def token_ids(self, drafted: torch.Tensor) -> torch.Tensor:
        """Numbers in the draft vocabulary -> token ids."""
        return drafted if self.adapter.draft_ids is None else self.adapter.draft_ids[drafted]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings(ids)

    def tree(self, streams: torch.Tensor, root: int, max_nodes: int, memory: TextMemory | None = None) -> DraftTree:
        """Grow the tree whose paths are jointly most likely, of at most `max_nodes` nodes.

        Args:
            streams: `[num_streams, dim]` of the accepted node. Stream j gives the nodes of depth j.
            memory: of the text up to the root; what it recalls is mixed into every node's distribution,
                and alone goes on where the streams end.
        """
        if max_nodes == 1:
            return DraftTree((root,), (-1,))
        config, transition = self.adapter.config, self.adapter.transition
        beam = max(1, max_nodes // 4)  # nodes of a level that may have children
        candidates: list[Candidate] = []
        frontier = [-1]  # nodes that may have children
        paths: list[tuple[int, ...]] = [()]  # the tokens that lead to each
        tokens = torch.tensor([root], device=streams.device)
        r = transition.begin(streams[:1])  # [frontier, rank]
        for j in range(1, config.num_streams + 1):
            stream = streams[j - 1 : j]
            r = transition.advance(r, self.embed(tokens), stream, j)
            drafted = self._likely(transition.adjust(stream, r))
            rows = {parent: row for row, parent in enumerate(frontier)}
            frontier, paths = self._grow(candidates, frontier, paths, drafted, memory, beam)
            r = r[[rows[candidates[i].parent] for i in frontier]]
            tokens = torch.tensor([candidates[i].token for i in frontier], device=streams.device)
        while memory and frontier:
            chosen = set(most_likely(candidates, range(len(candidates)), max_nodes - 1))
            going_on = [row for row, node in enumerate(frontier) if node in chosen]
            frontier, paths = [frontier[row] for row in going_on], [paths[row] for row in going_on]
            frontier, paths = self._grow(candidates, frontier, paths, [{}] * len(frontier), memory, beam)
        return plant(root, candidates, max_nodes)

    def _likely(self, hidden: torch.Tensor) -> list[dict[int, float]]:
        """The best tokens after each row of `[rows, dim]`, with their log probabilities."""
        logits = self.logits(hidden)  # [rows, draft vocabulary]
        # the normalizer first: a full log-softmax would write the whole vocabulary once more
        top = logits.topk(min(self.adapter.config.tree_top_k, logits.shape[1]), dim=-1)
        scores = (top.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0).tolist()
        return [dict(zip(*row, strict=True)) for row in zip(self.token_ids(top.indices).tolist(), scores, strict=True)]

    @staticmethod
    def _grow(
        candidates: list[Candidate],
        frontier: list[int],
        paths: list[tuple[int, ...]],
        drafted: list[dict[int, float]],
        memory: TextMemory | None,
        beam: int,
    ) -> tuple[list[int], list[tuple[int, ...]]]:
        """Add the children of the frontier to the candidates; returns the next frontier and its paths."""
        begin, path_of = len(candidates), dict(zip(frontier, paths, strict=True))
        for parent, path, likely in zip(frontier, paths, drafted, strict=True):
            so_far = 0.0 if parent == -1 else candidates[parent].score
            likely = blend(likely, memory.recall(path) if memory else None)
            candidates += [Candidate(token, parent, so_far + score) for token, score in likely.items()]
        best = most_likely(candidates, range(begin, len(candidates)), beam)
        return best, [(*path_of[candidates[i].parent], candidates[i].token) for i in best]
