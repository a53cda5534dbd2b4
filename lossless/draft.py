"""Drafting: from the streams of the accepted node to a tree under the certain token.

Knows: the transition head, the draft vocabulary, and how a tree is grown level by level, from the streams,
from what the text itself recalls, and with dice that are foreseen. Does not know: verification, caches, or how the
streams came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn import functional as F

from .adapter import StreamAdapter
from .dice import Dice
from .lookup import TextMemory
from .pruning import worth_streams
from .tree import Candidate, DraftTree, blend, most_likely, plant

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
        self._numbers: torch.Tensor | None = None  # [vocab], places in the draft vocabulary
        with align_module_device(head):  # Accelerate may keep the weight elsewhere
            weight = getattr(head, "weight", None)
            if adapter.draft_ids is not None and weight is not None and weight.is_floating_point():
                self._rows = weight.detach()[adapter.draft_ids].contiguous()  # [draft vocabulary, dim]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., draft vocabulary]`, in float32."""
        ids = self.adapter.draft_ids
        hidden = hidden.contiguous()  # of a slice torch would multiply each text with a copy of the weight
        if self._rows is not None:
            return self._scaled(F.linear(hidden.to(self._rows.dtype), self._rows).float())
        full = self.head(hidden)
        return self._scaled((full if ids is None else full[..., ids]).float())

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.scale == 1.0 else logits * self.scale

    def token_ids(self, drafted: torch.Tensor) -> torch.Tensor:
        """Numbers in the draft vocabulary -> token ids."""
        return drafted if self.adapter.draft_ids is None else self.adapter.draft_ids[drafted]

    def worth_streams(self, exits: torch.Tensor, trees: Sequence[DraftTree], floor: float, dice: Dice | None = None) -> torch.Tensor:
        """`[m]`, the rows of a pass over these trees that speculate; exits: `[batch, rows, dim]`, what the LM head reads
        of the early exit; dice: those that the trees were grown with."""
        if self._numbers is None and self.adapter.draft_ids is not None:
            ids = self.adapter.draft_ids
            self._numbers = torch.full((len(self.embeddings.weight),), -1, device=ids.device)
            self._numbers[ids] = torch.arange(len(ids), device=ids.device)
        logits = self.logits(exits)
        if dice is not None:
            depths = [tree.depths for tree in trees]
            for ahead in range(self.adapter.config.num_streams):
                places = [(text, row) for text, own in enumerate(depths) for row, depth in enumerate(own) if depth == ahead]
                texts, rows = torch.tensor(places, dtype=torch.long, device=logits.device).reshape(-1, 2).unbind(1)
                logits[texts, rows] = dice.throw(logits[texts, rows], texts, ahead, self.adapter.draft_ids)
        return torch.tensor(worth_streams(logits, trees, self._numbers, floor))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings(ids).to(self.adapter.device)

    def trees(
        self,
        streams: torch.Tensor,
        roots: Sequence[int],
        max_nodes: int,
        memories: Sequence[TextMemory | None],
        floor: float = 0.0,
        dice: Dice | None = None,
        depths: Sequence[int] | None = None,
    ) -> list[DraftTree]:
        """For each sequence, the tree whose paths are jointly most likely, of at most `max_nodes` nodes.

        Args:
            streams: `[batch, num_streams, dim]` of the accepted nodes. Stream j gives the nodes of depth j.
            memories: of each text up to its root; what one recalls is mixed into every node's distribution,
                and alone goes on where the streams end.
            floor: least probability of a path that is worth a node.
            dice: of these texts, for as many positions as there are streams; None if decoding is greedy.
            depths: of each tree at most, where a text is about to end.
        """
        if max_nodes == 1:
            return [DraftTree((root,), (-1,)) for root in roots]
        transition, device = self.adapter.transition, streams.device
        depths = depths or [_ANY_DEPTH] * len(roots)
        saplings = [_Sapling(max_nodes, memory, floor, depth) for memory, depth in zip(memories, depths, strict=True)]
        tokens = torch.tensor(roots, device=device)
        r = transition.begin(streams[:, 0])  # [frontier of all sequences, rank]
        owner = torch.arange(len(roots), device=device)  # whose each row of the frontier is
        for j in range(1, self.adapter.config.num_streams + 1):
            stream = streams[owner, j - 1]
            r = transition.advance(r, self.embed(tokens), stream, j)
            logits = self.logits(transition.adjust(stream, r))  # [frontier, draft vocabulary]
            if dice is not None:
                logits = dice.throw(logits, owner, j - 1, self.adapter.draft_ids)
            likely = iter(self._likely(logits))
            first, chosen = 0, []
            for sapling in saplings:
                count = len(sapling.frontier)
                chosen += [first + row for row in sapling.grow([next(likely) for _ in range(count)])]
                first += count
            if not chosen:
                break
            r, owner = r[chosen], owner[chosen]
            tokens = torch.tensor([path[-1] for sapling in saplings for path in sapling.paths], device=device)
        return [sapling.finish(root) for sapling, root in zip(saplings, roots, strict=True)]

    def _likely(self, logits: torch.Tensor) -> list[dict[int, float]]:
        """The best tokens of each row of `[rows, draft vocabulary]`, with their log probabilities."""
        # the normalizer first: a full log-softmax would write the whole vocabulary once more
        top = logits.topk(min(self.adapter.config.tree_top_k, logits.shape[1]), dim=-1)
        scores = (top.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0).tolist()
        return [dict(zip(*row, strict=True)) for row in zip(self.token_ids(top.indices).tolist(), scores, strict=True)]


class _Sapling:
    """One tree while it grows, level by level."""

    def __init__(self, max_nodes: int, memory: TextMemory | None, floor: float, depth: int) -> None:
        self.max_nodes, self.memory, self.left = max_nodes, memory, depth
        self.least = math.log(floor) if floor else -math.inf
        self.candidates: list[Candidate] = []
        self.frontier = [-1]  # candidates that may have children
        self.paths: list[tuple[int, ...]] = [()]  # the tokens that lead to each of them

    def grow(self, drafted: list[dict[int, float]]) -> list[int]:
        """Add children to the frontier, one dict of likely tokens for each of its nodes.

        Returns:
            For each node of the new frontier, the number of its parent in the old one.
        """
        if not self.left:
            self.frontier, self.paths = [], []
            return []
        self.left -= 1
        begin, parent_row = len(self.candidates), []
        for row, (parent, path, likely) in enumerate(zip(self.frontier, self.paths, drafted, strict=True)):
            so_far = 0.0 if parent == -1 else self.candidates[parent].score
            likely = blend(likely, self.memory.recall(path) if self.memory else None)
            children = [Candidate(token, parent, so_far + score) for token, score in likely.items()]
            children = [child for child in children if self.least <= child.score > -math.inf]
            self.candidates += children
            parent_row += [row] * len(children)
        beam = max(1, self.max_nodes // 4)
        self.frontier = most_likely(self.candidates, range(begin, len(self.candidates)), beam)
        rows = [parent_row[node - begin] for node in self.frontier]
        self.paths = [
            (*self.paths[row], self.candidates[node].token) for row, node in zip(rows, self.frontier, strict=True)
        ]
        return rows

    def finish(self, root: int) -> DraftTree:
        """Let the memory go on alone where that is worth a node, and plant the best."""
        while self.memory and self.frontier:
            worth = set(most_likely(self.candidates, range(len(self.candidates)), self.max_nodes - 1))
            rows = [row for row, node in enumerate(self.frontier) if node in worth]
            self.frontier, self.paths = [self.frontier[row] for row in rows], [self.paths[row] for row in rows]
            self.grow([{} for _ in rows])
        return plant(root, self.candidates, self.max_nodes)
