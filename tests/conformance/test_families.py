"""Every decoder-only family is served exactly, or refused at attach with a sentence that says why."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lossless.adapter import StreamAdapter
from lossless.config import StreamingConfig
from lossless.errors import UsageError
from lossless.generate import AcceleratedModel, accelerate, new_adapter

from ..conftest import prompt_ids
from ..test_batches import padded
from ..test_lossless import both
from .families import ALL, REQUIRED, WINDOW, build

CONFIG = StreamingConfig(num_streams=3, num_msa_layers=2, lora_rank=4, transition_rank=8, tree_nodes=12)


def digest(model: PreTrainedModel) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def attach(model: PreTrainedModel, schedule: str = "deferred") -> AcceleratedModel:
    return accelerate(model, new_adapter(model, CONFIG).randomize(2), schedule=schedule)


@pytest.mark.parametrize("family", REQUIRED)
def test_a_required_family_is_served_exactly(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = digest(model)
    for schedule in ("parallel", "deferred"):
        fast = attach(model, schedule)
        for options in ({}, {"do_sample": True, "top_k": 0}):
            expected, found = both(fast, prompt_ids(2 * WINDOW, seed=1), seed=5, max_new_tokens=2 * WINDOW, **options)
            assert torch.equal(expected, found), (schedule, options)
            assert fast.stats.served
            ids, mask = padded(5, 2 * WINDOW, 9)
            expected, found = both(fast, ids, seed=5, attention_mask=mask, max_new_tokens=WINDOW, **options)
            assert torch.equal(expected, found), (schedule, options, "batch")
    fast.adapter.save_pretrained(tmp_path)
    again = StreamAdapter.from_pretrained(tmp_path)
    assert again.projections() == fast.adapter.projections()
    assert digest(fast.detach()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", [family for family in ALL if family not in REQUIRED])
def test_any_other_family_is_served_exactly_or_refused(family: str) -> None:
    try:
        model = build(family)
    except (ImportError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, IndexError) as error:
        pytest.skip(f"no tiny model of it can be built here: {type(error).__name__}: {error}"[:160])
    try:
        fast = attach(model)
    except UsageError as refusal:
        assert len(str(refusal)) > 30
        return
    expected, found = both(fast, prompt_ids(2 * WINDOW, seed=1), seed=5, max_new_tokens=WINDOW)
    assert torch.equal(expected, found)
    assert fast.stats.served
