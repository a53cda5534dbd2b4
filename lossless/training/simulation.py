"""Acceptance on stored answers: what the decode loop would accept, without running it.

Knows: how the loop would go along a known answer. Does not know: how an adapter is trained, or the loop itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..drafting.drafter import Drafter
from ..drafting.tree import DraftTree
from ..streams.runner import StreamRunner
from .features import Features, FeatureStore, make_batch

_RUN = 64  # positions of an answer that speculate at once: what they see grows with their square
_TOGETHER = 32  # answers that are walked along at once


@dataclass(frozen=True)
class AcceptanceEstimate:
    """What drafting along known answers gives.

    Attributes:
        acceptance_length: emitted tokens per target pass.
        reached: for each stream, the part of passes whose accepted path holds its token.
    """

    acceptance_length: float
    reached: list[float]

    @classmethod
    def of(cls, counts: torch.Tensor) -> AcceptanceEstimate:
        """From what `simulate_acceptance` counts."""
        tokens, passes, *reached = counts.tolist()
        return cls(round(tokens / max(passes, 1), 3), [round(count / max(passes, 1), 4) for count in reached])


class _Progress:
    """How far along one stored answer the loop would have come."""

    def __init__(self, runner: StreamRunner, drafter: Drafter, features: Features) -> None:
        self.runner, self.drafter, self.features = runner, drafter, features
        self.text = features.ids.tolist()
        self.t = self.offset = features.prompt - 1  # x_{t+1} is certain; what follows it is drafted
        self.streams: torch.Tensor | None = None  # [positions from offset on, num_streams, dim]

    @property
    def over(self) -> bool:
        return self.t + 2 >= len(self.text)

    def speculate(self) -> torch.Tensor:
        """`[num_streams, dim]` at t; those of a run of positions are computed at once."""
        if self.streams is None or self.t >= self.offset + len(self.streams):
            runner, gamma = self.runner, self.runner.adapter.config.num_streams
            count = min(_RUN, len(self.text) - 1 - self.t)
            block = make_batch([self.features], [self.t], count, gamma, runner.first_top, runner.model.dtype)
            told = self.drafter.embed(block.tokens[:, :, 0])
            self.offset = self.t
            self.streams = runner.speculate(block.entry, block.positions, block.context, block.rows, told)[0]
        return self.streams[self.t - self.offset]

    def follow(self, tree: DraftTree) -> int:
        """Go on by one pass over this tree; returns how many of its tokens are accepted."""
        accepted, node = 0, tree.child(0, self.text[self.t + 2])
        while node is not None and self.t + accepted + 3 < len(self.text):
            accepted += 1
            node = tree.child(node, self.text[self.t + accepted + 2])
        self.t += accepted + 1
        return accepted


@torch.no_grad()
def simulate_acceptance(runner: StreamRunner, drafter: Drafter, store: FeatureStore, tree_nodes: int, process: int = 0, processes: int = 1) -> torch.Tensor:
    """Walk along the stored answers with the adapter's own trees, as the decode loop would, all answers at once.

    Args:
        process: which of several, each of which walks along its part of the answers.

    Returns:
        `[2 + num_streams]`: tokens, passes, and for each stream the passes whose accepted path holds its token.
    """
    gamma, device = runner.adapter.config.num_streams, runner.model.device
    counts = torch.zeros(2 + gamma, dtype=torch.float64)
    for begin in range(process, len(store), processes * _TOGETHER):
        numbers = range(begin, len(store), processes)[:_TOGETHER]
        walks = [_Progress(runner, drafter, store.get([number])[0]) for number in numbers]
        while walks := [walk for walk in walks if not walk.over]:
            roots = [walk.text[walk.t + 1] for walk in walks]
            trees = drafter.trees(torch.stack([walk.speculate() for walk in walks]), roots, tree_nodes, [None] * len(walks))
            for walk, tree in zip(walks, trees, strict=True):
                accepted = walk.follow(tree)
                counts += torch.tensor([1 + accepted, 1, *(accepted > j for j in range(gamma))])
    return counts.to(device, torch.float32)
