"""An adapter is attached to a base: who reads what, and how exactly.

Knows: that close calls and prompts are read with the base's own weights and kernels, or with the same bits, and trees through packed copies
where those pay. Does not know: the decode loop, or what a call asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapter.config import DraftConfig
from ..adapter.weights import StreamAdapter
from ..base.exact import exact_twin
from ..base.layers import device_of, input_device
from ..base.packed import is_padded, packed_twin, warm_up
from ..drafting.drafter import Drafter
from ..streams.fusing import exact_when_fused, fuse_passes, fuse_streams
from ..streams.graphs import GraphedRunner, PiecewiseRunner
from ..streams.passes import logit_scale
from ..streams.runner import StreamRunner
from .exactness import Guarantee, Passes, at_a_time, check_level, find_guarantee
from .limits import crowded_norms, each_alone
from .trial import check_served, trial
from .verdict import kept_guarantee, verdict_path

_ROWS_IN_PIECES = 8


@dataclass
class Attachment:
    """What a session runs through.

    Attributes:
        reader: passes with the base's own weights and kernels.
        runner: passes over trees, through a packed twin or the reader itself.
        drafter: trees from streams.
        guarantee: what holds; its bound grows when a call sees that it was too small.
        passes: over trees, that were asked for; rows: of those that are made, at most.
        kept: where it is kept on disk.
    """

    reader: StreamRunner
    runner: StreamRunner
    drafter: Drafter
    guarantee: Guarantee
    passes: Passes
    rows: int
    kept: Path

    def most_nodes(self, drafting: DraftConfig) -> int:
        """Of a tree: what was asked for, as far as it may be worth it."""
        return min(drafting.tree_nodes, self.rows)


def attach(base: PreTrainedModel, adapter: StreamAdapter, exact: str | None, passes: Passes) -> Attachment:
    """Look at a base as it is now: what it can do, and how exactly. No random generator is moved, not even for a while: others may draw.

    Args:
        exact: the level that is wanted, None for the strongest that pays.
        passes: over trees, that are to come.

    Raises:
        UsageError: the base cannot be served, or not at this level.
    """
    check_level(exact)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    dtype: Any = embeddings.weight.dtype
    adapter = adapter.copy_as(device_of(head), dtype)
    reader = _runner(base)(base, adapter)
    # of 16 bits, and 4, no guard is wide enough for a twin that rounds otherwise, and without a guard only `off` takes it
    coarse = exact != "off" and (dtype in (torch.bfloat16, torch.float16) or getattr(base, "is_quantized", False))
    model = exact_twin(base) if coarse and exact != "near-tie" and not reader.own_attention else None
    same_bits = model is not None
    if model is None and exact != "bitwise" and (exact == "off" or dtype not in (torch.bfloat16, torch.float16)):
        model = packed_twin(base)
    twin = None if model is None else _runner(model)(base, adapter, model)
    if twin is not None and same_bits:
        twin.fused = exact_when_fused(twin)
    elif twin is not None:
        fuse_passes(twin)

    asked, passes = passes, _affordable(passes, twin or reader)

    def look() -> Guarantee:
        check_served(reader)
        return find_guarantee(reader, exact, passes, twin, same_bits)

    with torch.no_grad(), trial(base):
        seen = reader.observe_anything()
    kept = verdict_path(reader, twin or reader, exact, passes, seen[1])
    guarantee = kept_guarantee(kept, reader.model, model, look)
    serves = twin is not None and (guarantee.twin or guarantee.level == "off")
    runner = twin if twin is not None and serves else reader
    if runner is twin and same_bits:
        runner.attends_exactly, runner.fused = guarantee.attends_exactly, guarantee.fused
        if (guarantee.limits or {}).get(twin.lm_head):
            _share_head(reader, twin)
    if guarantee.limits is not None:
        runner.keep_bits(guarantee.limits | dict.fromkeys(crowded_norms(runner.model), 1))
    elif runner is twin and same_bits:
        runner.keep_bits(at_a_time(runner.model, passes.rows))
    if guarantee.again:
        reader.keep_bits(each_alone(reader.model), always=False)
    drafter = Drafter(adapter, embeddings, head, logit_scale(reader, seen))
    with torch.no_grad():
        warm_up(runner.model, passes.rows)
        if runner is not reader:
            runner.observe_anything()  # streams call its layers as the base does: seen now, not in the first answer
    fuse_streams(runner)
    if runner is not reader:
        vars(reader).pop("stream_layers", None)  # of the trial; nothing of it runs through them from now on
    return Attachment(reader, runner, drafter, guarantee, asked, _affordable(passes, runner).rows, kept)


def _runner(model: Any) -> type[StreamRunner]:
    """The kind of runner for passes through a model."""
    if is_padded(model):
        return GraphedRunner
    return PiecewiseRunner if input_device(model).type == "cuda" else StreamRunner


def _affordable(passes: Passes, runner: StreamRunner) -> Passes:
    """Those of as few rows as may be worth it: in pieces each row calls the base's attention in every layer, and each number of rows is captured."""
    return replace(passes, rows=min(passes.rows, _ROWS_IN_PIECES)) if isinstance(runner, PiecewiseRunner) else passes


def _share_head(reader: StreamRunner, twin: StreamRunner) -> None:
    """Let the reader multiply a single row, the last one of a prompt, with the twin's LM head, which has the same bits: torch lays out the
    largest of all weights anew for it, which is most of what such a pass takes in memory."""
    own, packed = reader.lm_head.forward, twin.lm_head

    def head(rows: torch.Tensor) -> torch.Tensor:
        return type(packed).forward(packed, rows) if rows.numel() == rows.shape[-1] else own(rows)

    reader.lm_head.forward = head
