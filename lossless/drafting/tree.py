"""The draft tree: tokens that may follow, arranged by what they follow.

Knows: nodes, parents, ancestors, and which candidates are worth a row. Pure: no model, no state.
Does not know: where probabilities come from, or what the base will choose.

Node 0 is the root, the token that is already certain. Every parent stands before its children.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import UsageError


@dataclass(frozen=True)
class DraftTree:
    """A tree of tokens.

    Args:
        tokens: token id of each node.
        parents: number of each node's parent, -1 for the root.
        recalled: nodes that the text itself proposed (n-grams), rather than a stream.

    Raises:
        UsageError: no root, a parent that does not stand before its child, or twin siblings.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    recalled: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise UsageError(f"a tree needs a parent for each token, got {len(self.parents)} for {len(self.tokens)}")
        if not self.parents or self.parents[0] != -1:
            raise UsageError(f"node 0 must be the root (parent -1), got parents {self.parents[:1]}")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise UsageError(f"a parent must stand before its child, got {parent} for node {node}")
        if len(self._children) != len(self.tokens) - 1:
            raise UsageError("two children of one node must not hold the same token")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        pairs = zip(self.parents[1:], self.tokens[1:], strict=True)
        return {pair: node for node, pair in enumerate(pairs, start=1)}

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that holds `token`, if it was drafted."""
        return self._children.get((node, token))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps from the root to each node."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Where each node came from: j for stream j, which drafts depth j; -1 for the text itself; 0 for the root."""
        return tuple(-1 if node in self.recalled else depth for node, depth in enumerate(self.depths))

    def mask(self, width: int | None = None) -> torch.Tensor:
        """`[width, width]`, True where a node may attend: to its ancestors and to itself. Rows behind the last node see themselves.

        width: at least as many as there are nodes, which is the default.
        """
        width = len(self) if width is None else width
        allowed: list[list[bool]] = []
        for node in range(width):
            parent = self.parents[node] if node < len(self) else -1
            allowed.append([False] * width if parent == -1 else allowed[parent].copy())
            allowed[node][node] = True
        return torch.tensor(allowed)


def blend(drafted: dict[int, float], recalled: tuple[int, float] | None) -> dict[int, float]:
    """Mix a recalled token, trusted with some probability, into drafted tokens and their log probabilities.

        p(token) = trust [token = recalled] + (1 - trust) q(token)
    """
    if recalled is None:
        return drafted
    token, trust = recalled
    mixed = {other: score + math.log1p(-trust) for other, score in drafted.items()}
    mixed[token] = math.log(trust + (1 - trust) * math.exp(drafted.get(token, -math.inf)))
    return mixed
