"""Parity: whether the decode loop accepts what training said it would.

Knows: how to run the loop over held-out prompts, and to simulate its acceptance along what it said. Does not know: how an adapter
is trained.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..adapter.weights import StreamAdapter
from ..base.loading import Base
from ..distillation.answers import Answers
from ..generation.model import AcceleratedModel
from ..training.features import FeatureStore, affordable
from ..training.simulation import AcceptanceEstimate, simulate_acceptance

TOLERANCE = 0.05  # simulated and decoded may differ by so much
CONTEXTS = (128, 256, 512, 1024, 2048)  # tokens before an answer's middle, up to which runs are told together


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
    """Run the real decode loop on held-out prompts, greedily, and simulate its acceptance on what it said.

    Trees are full and without recall: those that training simulates with.

    Args:
        held_out: the answers that training simulated along, and `trained`, the acceptance length that it saw there.

    Returns:
        For JSON: `trained` and, along the same answers with the adapter as it was saved, `read_back`; on what the loop said,
        greedily, the `foretold` and `decoded` acceptance length, and their `difference` as a part of the former; `agrees`
        (both pairs within `TOLERANCE`); and the decoded acceptance length by category and by context length.
    """
    drafting = replace(adapter.config.drafting, recall=False, adaptive=False)
    fast = AcceleratedModel(base.model, adapter, "off", drafting)
    runs, said = [], []
    for number in range(len(held_out)):
        record = held_out[number]
        ids = torch.tensor([record["prompt_ids"]], device=base.model.device)
        count = len(record["answer_ids"])
        out = fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        said.append(record | {"answer_ids": out[0, ids.shape[1] :].tolist()})
        context = ids.shape[1] + fast.stats.tokens // 2
        runs.append(Decoded(record["id"], record["category"], context, fast.stats.tokens, fast.stats.target_passes))
    runner, drafter, nodes = fast.runner, fast.drafter, fast.attached.most_nodes(drafting)
    store = FeatureStore(runner, Answers.of(said), affordable(feature_gb, base.model.device))
    simulated = AcceptanceEstimate.of(simulate_acceptance(runner, drafter, store, nodes))
    store = FeatureStore(runner, held_out, affordable(feature_gb, base.model.device))
    read_back = AcceptanceEstimate.of(simulate_acceptance(runner, drafter, store, nodes)).acceptance_length
    decoded = acceptance(runs)
    difference = abs(decoded - simulated.acceptance_length) / simulated.acceptance_length
    return {
        "trained": trained,
        "read_back": read_back,
        "foretold": simulated.acceptance_length,
        "decoded": decoded,
        "difference": round(difference, 4),
        "agrees": max(difference, abs(read_back - trained) / trained) <= TOLERANCE,
        "tree_nodes": nodes,
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
