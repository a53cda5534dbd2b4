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

from .adapter import StreamAdapter
from .answers import Answers
from .draft import Drafter
from .features import FeatureStore, make_block
from .generate import AcceleratedModel
from .models import Base
from .streams import StreamRunner

_RUN = 256  # positions of an answer that speculate at once: what they see grows with their square
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


@torch.no_grad()
def foretell(runner: StreamRunner, drafter: Drafter, store: FeatureStore, tree_nodes: int) -> Foretold:
    """Walk along the stored answers with the adapter's own trees, as the decode loop would."""
    tokens = passes = 0
    gamma = runner.adapter.config.num_streams
    reached = [0] * (gamma + 1)
    for number in range(len(store)):
        features = store.get([number])
        text, t = features[0].ids.tolist(), features[0].prompt - 1
        offset, streams = t, None
        while t + 2 < len(text):  # x_{t+1} is certain; draft what follows it
            if streams is None or t >= offset + len(streams):
                block = make_block(features, [t], min(_RUN, len(text) - 1 - t), gamma, runner.first_top, runner.model.dtype)
                told = drafter.embed(block.tokens[:, :, 0])
                offset, streams = t, runner.speculate(block.entry, block.positions, block.context, block.rows, told)[0]
            [tree] = drafter.trees(streams[None, t - offset], [text[t + 1]], tree_nodes, [None])
            node, ahead = tree.child(0, text[t + 2]), t + 2
            while node is not None and ahead + 1 < len(text):
                ahead += 1
                node = tree.child(node, text[ahead])
            reached[min(ahead - t - 2, gamma)] += 1
            tokens, passes, t = tokens + ahead - t - 1, passes + 1, ahead - 1
    return Foretold(
        round(tokens / max(passes, 1), 3), [round(sum(reached[j:]) / max(passes, 1), 4) for j in range(1, gamma + 1)]
    )


@dataclass(frozen=True)
class Decoded:
    """One prompt, answered by the decode loop."""

    id: str
    category: str
    context: int  # tokens of the text in the middle of the answer
    tokens: int
    target_passes: int


@torch.no_grad()
def check_parity(base: Base, adapter: StreamAdapter, held_out: Answers, feature_gb: float) -> dict[str, Any]:
    """Run the real decode loop on held-out prompts, greedily, and foretell its acceptance on what it said.

    Trees are the adapter's own, without a floor and without recall: those that training foretells with.

    Returns:
        For JSON: `foretold` and `decoded` acceptance length, their `difference` as a part of the foretold, `agrees`
        (within `TOLERANCE`), and the decoded acceptance length by category and by context length.
    """
    fast = AcceleratedModel(base.model, adapter, "off")
    fast.recall, fast.tree_floor = False, 0.0
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
    with runner.installed():
        foretold = foretell(runner, drafter, FeatureStore(runner, Answers.of(said), feature_gb), fast.tree_nodes)
    decoded = acceptance(runs)
    difference = abs(decoded - foretold.acceptance_length) / foretold.acceptance_length
    return {
        "foretold": foretold.acceptance_length,
        "decoded": decoded,
        "difference": round(difference, 4),
        "agrees": difference <= TOLERANCE,
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
