"""Passes that call nothing of a model but its parts, where its layers are fused.

Knows: which models are no more than their parts: those of transformers, to whose forwards nobody listens, and which give the very same bits so.
Does not know: what fused layers compute, or when passes are made.
"""

from __future__ import annotations

from typing import Any

import torch

from ..base.layers import input_device
from ..base.structure import comes_from, listeners
from ..errors import CALLED_OTHERWISE
from .cache import RowCache
from .fusing import runs_of
from .invariance import AloneRows
from .masks import PositionMask
from .passes import Pass, PassOutput, with_plan


class ShortPass:
    """Passes of a runner by its model's parts: embeddings, rotary embedding, all layers in two calls, the norm behind them, and the LM head.

    What a model's own forward does besides takes a millisecond, and is for other models, or for other passes.
    """

    def __init__(self, runner: Any, turn: Any) -> None:
        self.runner, self.turn, self.runs, self.embed = runner, turn, runs_of(runner.layers), runner.model.get_input_embeddings()

    @classmethod
    @torch.no_grad()
    def of(cls, runner: Any) -> ShortPass | None:
        """Of a runner whose layers are fused; None if its model does more than its parts, or somebody listens to it."""
        around = [part for part in runner.model.modules() if any(inner is runner.layers for inner in part.modules()) and part is not runner.layers]
        if not all(map(_is_plain, around)):
            return None
        ids = torch.tensor([[1 + 3 * i % (runner.text_config.vocab_size - 1) for i in range(3)]], device=input_device(runner.model))
        places = torch.arange(3, device=ids.device)[None]
        own = _planned(runner, places, None, RowCache(len(runner.layers)))
        logits = runner.run(own, ids, places, own.cache)
        if len(own.rotaries) != 1:  # how the model calls it is how it is called here
            return None
        short, plan = cls(runner, own.rotaries[0][0]), _planned(runner, places, None, RowCache(len(runner.layers)))
        try:
            found = short.read(plan, ids, places)
        except CALLED_OTHERWISE:
            return None
        if found is None or not torch.equal(found, logits) or not torch.equal(plan.entry, own.entry):
            return None
        return short if torch.equal(plan.cache.rows[-1].keys, own.cache.rows[-1].keys) else None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, tree_mask: torch.Tensor | None, cache: RowCache) -> PassOutput:
        """As `StreamRunner.verify`, of one text without padding, no row of which speculates."""
        plan = _planned(self.runner, positions, tree_mask, cache)
        logits = self.read(plan, ids, positions)
        return PassOutput(self.runner.run(plan, ids, positions, cache) if logits is None else logits, plan.entry)

    def read(self, plan: Pass, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """`[1, rows, vocab]`; None if the layers cannot take such rows, or not so."""
        hidden = self.embed(ids)
        turned = self.turn(hidden, positions)
        if not all(run.serves(plan, hidden, turned) for run in self.runs):
            return None
        return with_plan(plan, lambda: self._read(plan, hidden, turned))

    def _read(self, plan: Pass, hidden: torch.Tensor, turned: Any) -> torch.Tensor | None:
        for run in self.runs:
            plan.entry = hidden  # of the last of them: from layer N - N_s on
            if (found := run(plan, hidden, turned)) is None:
                return None
            hidden = found
        logits: torch.Tensor = self.runner.lm_head(self.runner.finish(hidden))
        return logits


def _planned(runner: Any, positions: torch.Tensor, tree_mask: torch.Tensor | None, cache: RowCache) -> Pass:
    """What hooks are to know of a pass."""
    rows = positions.shape[1]
    plan = Pass(runner.implementation, 1, rows, PositionMask(None, positions, positions), cache=cache, keeps_bits=runner.limits is not None)
    plan.alone = plan.paths = AloneRows([range(row + 1) for row in range(rows)] if tree_mask is None else paths_of(tree_mask))
    return plan


def _is_plain(part: Any) -> bool:
    """Whether a part's forward is transformers' own, and nobody listens to it."""
    return comes_from(type(part).forward).partition(".")[0] in ("transformers", "torch") and not listeners(part)


def paths_of(tree_mask: torch.Tensor) -> list[list[int]]:
    """Of each row of `[1, rows, rows]` the rows that it sees."""
    return [[i for i, seen in enumerate(row) if seen] for row in tree_mask[0].tolist()]
