"""Drafting: from the streams of the accepted node to a tree under the certain token.

Knows: the transition head, the draft vocabulary, and how a tree is grown level by level. Does not
know: verification, caches, or how the streams came about.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .adapter import StreamAdapter
from .tree import Candidate, DraftTree, most_likely, plant


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

    def tree(self, streams: torch.Tensor, root: int, max_nodes: int) -> DraftTree:
        """Grow the tree whose paths are jointly most likely, of at most `max_nodes` nodes.

        Args:
            streams: `[num_streams, dim]` of the accepted node. Stream j gives the nodes of depth j.
        """
        if max_nodes == 1:
            return DraftTree((root,), (-1,))
        config, transition = self.adapter.config, self.adapter.transition
        beam = max(1, max_nodes // 4)  # nodes of a level that may have children
        candidates: list[Candidate] = []
        frontier = [-1]
        tokens = torch.tensor([root], device=streams.device)
        r = transition.begin(streams[:1])  # [frontier, rank]
        for j in range(1, config.num_streams + 1):
            stream = streams[j - 1 : j]
            r = transition.advance(r, self.embed(tokens), stream, j)
            logits = self.logits(transition.adjust(stream, r))  # [frontier, draft vocabulary]
            # the normalizer first: a full log-softmax would write the whole vocabulary once more
            top = logits.topk(min(config.tree_top_k, logits.shape[1]), dim=-1)
            scores = (top.values - logits.logsumexp(-1, keepdim=True)).tolist()
            ids = self.token_ids(top.indices).tolist()
            begin = len(candidates)
            for row, parent in enumerate(frontier):
                so_far = 0.0 if parent == -1 else candidates[parent].score
                candidates += [
                    Candidate(t, parent, so_far + min(s, 0.0)) for t, s in zip(ids[row], scores[row], strict=True)
                ]
            level = range(begin, len(candidates))
            frontier_rows = {parent: row for row, parent in enumerate(frontier)}
            frontier = most_likely(candidates, level, beam)
            r = r[[frontier_rows[candidates[i].parent] for i in frontier]]
            tokens = torch.tensor([candidates[i].token for i in frontier], device=streams.device)
        return plant(root, candidates, max_nodes)
