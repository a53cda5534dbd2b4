"""Verification: which drafts are accepted. The one rule: a draft stays only if it equals the base's own choice.

Knows: a path through the tree along the base's choices. Pure: how the base chooses is handed in. Does not know:
probabilities, tolerances, thresholds; there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..drafting.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """What a verification pass gives.

    Attributes:
        path: accepted nodes from the root on; their rows stay in the cache.
        tokens: the base's choice at each of them: the tokens emitted. The last one is the next root.
        stopped: generation ends with the last of these tokens.
        open: the choice at the last node is too close to call, and not among the tokens.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    stopped: bool
    open: bool = False


def accept(tree: DraftTree, choose: Callable[[int], tuple[int, bool] | None]) -> Accepted:
    """From the root, go to the child that equals the base's choice, while there is one.

    Args:
        choose: node -> (the base's choice after that node, whether generation ends with it). Called
            once for each emitted token, in the order of the text, as the base's own loop would: so
            that random draws, stateful logits processors and stopping criteria see what they would see.
            None ends the path: that choice has to be made from a pass of another shape.
    """
    path: list[int] = [0]
    tokens: list[int] = []
    while True:
        if (choice := choose(path[-1])) is None:
            return Accepted(tuple(path), tuple(tokens), stopped=False, open=True)
        token, stopped = choice
        tokens.append(token)
        child = None if stopped else tree.child(path[-1], token)
        if child is None:
            return Accepted(tuple(path), tuple(tokens), stopped)
        path.append(child)
