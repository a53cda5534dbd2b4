"""An adapter is attached to a base: who reads what, and how exactly.

Knows: that close calls and prompts are read with the base's own weights and kernels, and trees through packed copies where those
pay. Does not know: the decode loop, or what a call asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapter import StreamAdapter
from ..anatomy import device_of
from ..base.packed import packed_twin, warm_up
from ..draft import Drafter
from ..probe import Guarantee, check_level, check_served, find_guarantee, logit_scale
from ..streams import StreamRunner


@dataclass(frozen=True)
class Attachment:
    """What a session runs through.

    Attributes:
        reader: passes with the base's own weights and kernels.
        runner: passes over trees, through a packed twin or the reader itself.
        drafter: trees from streams.
        guarantee: what holds.
    """

    reader: StreamRunner
    runner: StreamRunner
    drafter: Drafter
    guarantee: Guarantee


def attach(base: PreTrainedModel, adapter: StreamAdapter, exact: str | None) -> Attachment:
    """Look at a base as it is now: what it can do, and how exactly. No random generator is moved, not even for a while: others may draw.

    Args:
        exact: the level that is wanted, None for the strongest that pays.

    Raises:
        UsageError: the base cannot be served, or not at this level.
    """
    check_level(exact)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    dtype: Any = embeddings.weight.dtype
    adapter = adapter.copy_as(device_of(head), dtype)
    reader = StreamRunner(base, adapter)
    check_served(reader)
    model = None if exact == "bitwise" else packed_twin(base)
    twin = None if model is None else StreamRunner(base, adapter, model)
    guarantee = find_guarantee(reader, exact, twin)
    if guarantee.limits is not None:
        reader.keep_bits(guarantee.limits)
    drafter = Drafter(adapter, embeddings, head, logit_scale(reader))
    serves = twin is not None and (guarantee.twin or guarantee.level == "off")
    runner = twin if twin is not None and serves else reader
    with torch.no_grad():
        warm_up(runner.model, adapter.config.tree_nodes)
    return Attachment(reader, runner, drafter, guarantee)
