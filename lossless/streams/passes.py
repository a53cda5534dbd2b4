"""One pass through the base's layers: the plan that hooks and attention go by, and what it yields.

Knows: which rows of a pass are the base's own and which are streams. Does not know: when passes are made, or what for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..base.layers import CACHE, input_device
from ..kernels.gpu import Told
from ..kernels.graphs import Pieces
from .invariance import AloneRows
from .masks import PositionMask


@dataclass
class Pass:
    """One trip through the layers: what the hooks and the attention function must know of it."""

    implementation: str  # the base's own attention
    batch: int
    main_rows: int
    main: PositionMask | None = None  # None: a pass of streams alone
    stream: PositionMask | None = None  # its keys are the main keys and those of the streams
    last_only: bool = False  # logits of the last main row only
    begin: Callable[[torch.Tensor], None] | None = None  # given the main rows at layer N - N_s, fills the next two
    nodes: torch.Tensor | None = None  # [m] main rows that speculate
    cache: Any = None
    keeps_bits: bool = False  # main rows are to have the bits of the base's own passes
    paths: AloneRows | None = None  # of the main rows, of one text without padding, behind a prompt
    alone: AloneRows | None = None  # main rows that are read as passes of one row
    exactly: bool = False  # such rows attend by base/exact.py
    told: Told | None = None  # what a captured pass knows of the cache (graphs.py)
    few: bool = False  # its layers are computed in few kernels (base/gpu_layers.py)
    pieces: Pieces | None = None  # a pass that is captured now, but for its attention
    done: int = 0  # layers below this one have been computed by one before them (fusing.py)
    rotaries: list[tuple[Callable[..., Any], Any]] = field(default_factory=list)  # and what each call gave
    filled: dict[Any, Any] = field(default_factory=dict)  # what fills the layers' arguments, by rows and window
    entry: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch, main rows, dim] at layer N - N_s
    streams: torch.Tensor | None = None  # [batch, m * gamma, dim] after the final norm
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch, main rows, dim] after it


Found = TypeVar("Found")
PASS: ContextVar[Pass | None] = ContextVar("lossless_pass", default=None)


@dataclass(frozen=True)
class PassOutput:
    """What a pass yields.

    Attributes:
        logits: `[batch, rows, vocab]` of the main rows that were asked for.
        entry: `[batch, rows, dim]`, the main rows at layer N - N_s, where streams start.
        streams: `[batch, nodes, num_streams, dim]` after the final norm, for the nodes that speculated.
        nodes: their rows.
    """

    logits: torch.Tensor
    entry: torch.Tensor
    streams: torch.Tensor | None = None
    nodes: tuple[int, ...] = ()


def with_plan(plan: Pass, run: Callable[[], Found]) -> Found:
    """What `run` gives while hooks and attention go by this plan.

    No context manager: Ctrl-C at the entry of its exit would leave the plan behind.
    """
    before = PASS.get()
    try:
        PASS.set(plan)
        return run()
    finally:
        PASS.set(before)


def read_plainly(base: Any, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> PassOutput:
    """A pass of one row through the base itself, `[1, 1]`: nothing is hooked in, and no streams can start from it."""
    device = input_device(base)
    given = {"input_ids": ids.to(device), "position_ids": positions.to(device), CACHE: cache}
    return PassOutput(base(**given, use_cache=True).logits, torch.empty(0))


def logit_scale(runner: Any, seen: tuple[Pass, torch.Tensor] | None = None) -> float:
    """What the base multiplies its LM head's logits with (a soft cap counts as its best straight line); 1 for most.

    seen: what `observe_anything` gave, if it was asked already.
    """
    with torch.no_grad():
        plan, logits = seen or runner.observe_anything()
        bare = runner.lm_head(plan.final[:, -1:]).float().to(logits.device)
    found = float((bare * logits.float()).sum() / (bare * bare).sum())
    return found if abs(found - 1) >= 0.02 else 1.0  # also if there is nothing to scale
