"""Acceptance foretold on stored answers, and whether the decode loop keeps what was foretold.

Knows: how the loop would walk along a known answer, and how to run the loop itself over the same prompts. Does not
know: how an adapter is trained.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..adapter.weights import StreamAdapter
from ..base.loading import Base
from ..distillation.answers import Answers
from ..drafting.drafter import Drafter
from ..drafting.tree import DraftTree
from ..generation.model import AcceleratedModel
from ..streams.runner import StreamRunner
from .features import Features, FeatureStore, affordable, make_block

_RUN = 64  # positions of an answer that speculate at once: what they see grows with their square
_TOGETHER = 32  # answers that are walked along at once
TOLERANCE = 0.05  # foretold and decoded may differ by so much
CONTEXTS = (128, 256, 512, 1024, 2048)  # tokens before an answer's middle, up to which runs are told together


@dataclass(frozen=True)
class Foretold:
    """What drafting along known answers gives.

    Attributes:
        acceptance_length: emitted tokens per target pass.
        reached: for each stream, the part of passes whose accepted path holds its token.
    """

    acceptance_length: float
    reached: list[float]

    @classmethod
    def of(cls, counts: torch.Tensor) -> Foretold:
        """From what `walk_along` counts."""
        tokens, passes, *reached = counts.tolist()
        return cls(round(tokens / max(passes, 1), 3), [round(count / max(passes, 1), 4) for count in reached])


class _Walk:
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
            block = make_block([self.features], [self.t], count, gamma, runner.first_top, runner.model.dtype)
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
def walk_along(runner: StreamRunner, drafter: Drafter, store: FeatureStore, tree_nodes: int, process: int = 0, processes: int = 1) -> torch.Tensor:
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
        walks = [_Walk(runner, drafter, store.get([number])[0]) for number in numbers]
        while walks := [walk for walk in walks if not walk.over]:
            roots = [walk.text[walk.t + 1] for walk in walks]
            trees = drafter.trees(torch.stack([walk.speculate() for walk in walks]), roots, tree_nodes, [None] * len(walks))
            for walk, tree in zip(walks, trees, strict=True):
                accepted = walk.follow(tree)
                counts += torch.tensor([1 + accepted, 1, *(accepted > j for j in range(gamma))])
    return counts.to(device, torch.float32)


@dataclass(frozen=True)
class Decoded:
    """One prompt, answered by the decode loop."""

    id: str
    category: str
    context: int  # tokens of the text in the middle of the answer
    tokens: int
    target_passes: int


@torch.no_grad()
def check_parity(base: Base, adapter: StreamAdapter, held_out: Answers, feature_gb: float, trained: float) -> dict[str, Any]:
    """Run the real decode loop on held-out prompts, greedily, and foretell its acceptance on what it said.

    Trees are full and without recall: those that training foretells with.

    Args:
        held_out: the answers that training foretold along, and `trained`, the acceptance length that it saw there.

    Returns:
        For JSON: `trained` and, along the same answers with the adapter as it was saved, `read_back`; on what the loop said,
        greedily, the `foretold` and `decoded` acceptance length, and their `difference` as a part of the foretold; `agrees`
        (both pairs within `TOLERANCE`); and the decoded acceptance length by category and by context length.
    """
    fast = AcceleratedModel(base.model, adapter, "off")
    fast.recall = fast.adaptive = False
    runs, said = [], []
    for number in range(len(held_out)):
        record = held_out[number]
        ids = torch.tensor([record["prompt_ids"]], device=base.model.device)
        count = len(record["answer_ids"])
        out = fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        said.append(record | {"answer_ids": out[0, ids.shape[1] :].tolist()})
        context = ids.shape[1] + fast.stats.tokens // 2
        runs.append(Decoded(record["id"], record["category"], context, fast.stats.tokens, fast.stats.target_passes))
    runner, drafter = fast.runner, fast.drafter
    store = FeatureStore(runner, Answers.of(said), affordable(feature_gb, base.model.device))
    foretold = Foretold.of(walk_along(runner, drafter, store, fast.tree_nodes))
    store = FeatureStore(runner, held_out, affordable(feature_gb, base.model.device))
    read_back = Foretold.of(walk_along(runner, drafter, store, fast.tree_nodes)).acceptance_length
    decoded = acceptance(runs)
    difference = abs(decoded - foretold.acceptance_length) / foretold.acceptance_length
    return {
        "trained": trained,
        "read_back": read_back,
        "foretold": foretold.acceptance_length,
        "decoded": decoded,
        "difference": round(difference, 4),
        "agrees": max(difference, abs(read_back - trained) / trained) <= TOLERANCE,
        "tree_nodes": fast.tree_nodes,
        "prompts": len(runs),
        "tokens": sum(run.tokens for run in runs),
        "by_category": _by((run.category or "-", run) for run in runs),
        "by_context": _by((_bucket(run.context), run) for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def acceptance(runs: Iterable[Decoded]) -> float:
    """Emitted tokens per target pass, the first token of each answer aside."""
    runs = list(runs)
    passes = sum(run.target_passes for run in runs)
    return round(sum(run.tokens - 1 for run in runs) / passes, 3) if passes else 1.0


def _by(named: Iterable[tuple[str, Decoded]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Decoded]] = defaultdict(list)
    for name, run in named:
        groups[name].append(run)
    return {
        name: {"prompts": len(runs), "tokens": sum(r.tokens for r in runs), "acceptance_length": acceptance(runs)}
        for name, runs in sorted(groups.items(), key=lambda item: (len(item[0]), item[0]))
    }


def _bucket(context: int) -> str:
    place = bisect.bisect_left(CONTEXTS, context)
    return f"up to {CONTEXTS[place]}" if place < len(CONTEXTS) else f"over {CONTEXTS[-1]}"
