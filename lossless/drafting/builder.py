"""A draft tree while it grows, level by level, and its size.

Knows: candidates, their probabilities, what the text recalls, and which of them are worth a row under a cost curve. Pure but for
the tree that grows. Does not know: streams, or where probabilities come from.

A tree of the n most likely candidates emits E(n) = 1 + sum of their path probabilities tokens on average, and its step takes
T(n) = draft + verify(n + 1). The tree that is planted has the largest E(n) / T(n).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from .costs import CostCurve
from .ngram import NGramCache
from .tree import DraftTree, blend

_NEVER = -math.inf


class TreeBuilder:
    """The tree of one text.

    Args:
        max_nodes: at most, the root counted.
        ngrams: of the text up to its root, or None; what they recall is mixed into every node's distribution, and they alone go
            on where drafts end.
        depth: at most, where the text is about to end.
        curve: what rows cost; None: they cost nothing, and the tree is always full.
    """

    def __init__(self, max_nodes: int, ngrams: NGramCache | None, depth: int, curve: CostCurve | None) -> None:
        self.max_nodes, self.ngrams, self.left, self.curve = max_nodes, ngrams, depth, curve
        self.levels = 0  # that were drafted, not recalled
        self.tokens: list[int] = []  # of each candidate, parents first
        self.parents: list[int] = []  # candidates, -1 for the root
        self.scores: list[float] = []  # log probability of the whole path
        self.recalled: set[int] = set()  # candidates that owe most of their probability to an n-gram
        self.frontier = [-1]  # candidates that may have children
        self.paths: list[tuple[int, ...]] = [()]  # the tokens that lead to each of them
        self._best: list[tuple[float, int]] = []  # candidates that may become nodes, best first, of equals the first drafted: (-score, candidate)
        # a row that is less likely to give a token than to cost one is never taken, nor one behind as many better ones as there may be
        self._least = math.log(max(1e-9, (curve.verify_s(2) - curve.verify_s(1)) / curve.verify_s(1) / 8)) if curve else _NEVER

    @property
    def widest(self) -> int:
        """The most nodes that its frontier may have."""
        return max(1, self.max_nodes // 4)

    def grow(self, drafted: Sequence[dict[int, float]]) -> list[int]:
        """Add children to the frontier, one dict of likely tokens with their log probabilities for each of its nodes.

        Returns:
            For each node of the new frontier, the number of its parent in the old one.
        """
        children: list[tuple[float, int, int]] = []  # -score, candidate, row of its parent
        if self.left:
            self.left -= 1
            for row, (parent, path, likely) in enumerate(zip(self.frontier, self.paths, drafted, strict=True)):
                so_far = 0.0 if parent == -1 else self.scores[parent]
                recalled = self.ngrams.recall(path) if self.ngrams else None
                for token, score in blend(likely, recalled).items():
                    if (score := so_far + score) > _NEVER and score >= self._least:
                        if recalled and token == recalled[0] and recalled[1] > (1 - recalled[1]) * math.exp(likely.get(token, _NEVER)):
                            self.recalled.add(len(self.tokens))
                        children.append((-score, len(self.tokens), row))
                        self.tokens.append(token)
                        self.parents.append(parent)
                        self.scores.append(score)
        children.sort()
        self._best = sorted(self._best + [child[:2] for child in children])[: self.max_nodes - 1]
        if len(self._best) == self.max_nodes - 1:
            self._least = max(self._least, -self._best[-1][0])
        best = children[: self.widest]
        self.frontier = [candidate for _, candidate, _ in best]
        self.paths = [(*self.paths[row], self.tokens[candidate]) for _, candidate, row in best]
        return [row for _, _, row in best]

    def worth_a_level(self) -> bool:
        """Whether another level of drafts is likely to give more than it costs.

        At most it makes every path of the frontier one token longer, by a row for each.
        """
        if not self.frontier or not self.left:
            return False
        if self.curve is None or not self.levels:
            return True
        plain_s, row_s = self.curve.verify_s(1), self.curve.row_s
        gain_s = sum(max(0.0, math.exp(self.scores[candidate]) * plain_s - row_s) for candidate in self.frontier)
        return gain_s > self.curve.level_s

    def finish(self, root: int) -> DraftTree:
        """Let the n-grams go on alone where that is worth a node, and plant the best."""
        while self.ngrams and self.frontier and self.left:
            worth = {candidate for _, candidate in self._best}
            rows = [row for row, node in enumerate(self.frontier) if node == -1 or node in worth]
            self.frontier, self.paths = [self.frontier[row] for row in rows], [self.paths[row] for row in rows]
            self.grow([{} for _ in rows])
        best = self._best
        if self.curve is not None:
            best = best[: best_size([math.exp(-score) for score, _ in best], self.curve, self.curve.draft_s(self.levels))]
        return plant(root, self.tokens, self.parents, [candidate for _, candidate in best], self.recalled)


def best_size(probabilities: Sequence[float], curve: CostCurve, drafting_s: float) -> int:
    """How many of these candidates, likeliest first, make the tree that emits most tokens per second."""
    expected, best, size = 1.0, 1.0 / (drafting_s + curve.verify_s(1)), 0
    for count, probability in enumerate(probabilities, start=1):
        expected += probability
        rate = expected / (drafting_s + curve.verify_s(count + 1))
        if rate > best:
            best, size = rate, count
    return size


def plant(
    root: int, tokens: Sequence[int], parents: Sequence[int], chosen: Sequence[int], recalled: Collection[int] = ()
) -> DraftTree:
    """The tree of the root and some candidates, each of which comes with its parent, and of siblings the likeliest first.

    Nodes stand depth first, the likeliest child first: rows that are accepted then mostly stand where they belong.

    Args:
        chosen: candidates, likeliest first. A path is never likelier than its parent's, so the best come with their parents.
        recalled: candidates that the text itself proposed.
    """
    children: dict[int, list[int]] = {}
    for candidate in chosen:
        children.setdefault(parents[candidate], []).append(candidate)
    order: list[int] = []
    waiting = children.get(-1, [])[::-1]
    while waiting:
        candidate = waiting.pop()
        order.append(candidate)
        waiting += children.get(candidate, [])[::-1]
    node_of = {-1: 0} | {candidate: node for node, candidate in enumerate(order, start=1)}
    from_the_text = frozenset(node_of[candidate] for candidate in order if candidate in recalled)
    return DraftTree((root, *(tokens[i] for i in order)), (-1, *(node_of[parents[i]] for i in order)), from_the_text)
