"""Saving, loading, fitting; and a base that no adapter leaves a trace on."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lossless.adapter.compat import new_adapter
from lossless.adapter.config import AdapterConfig, DraftConfig
from lossless.adapter.hub import CONFIG_FILE, WEIGHTS_FILE
from lossless.adapter.weights import StreamAdapter
from lossless.errors import UsageError
from lossless.generation.model import accelerate

from .conftest import build_tiny, prompt_ids, tiny_config


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_streams": 0}, "num_streams must be at least 1, got 0"),
        ({"tree_nodes": -3}, "tree_nodes must be at least 1, got -3"),
        ({"draft_vocab_size": -1}, "draft_vocab_size must be at least 0, got -1"),
        ({"schedule": "later"}, "schedule must be one of parallel, deferred, got 'later'"),
    ],
)
def test_config_states_the_rule_and_the_value(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        AdapterConfig().changed(**change)


def test_more_layers_than_the_model_has_are_refused(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match=r"num_msa_layers must be between 1 and 3 \(model depth\), got 5"):
        accelerate(tiny, tiny_config(num_msa_layers=5))


def test_attach_generate_detach_leave_every_byte(tiny: LlamaForCausalLM) -> None:
    before, hooks, ids = digest(tiny), _hooks(tiny), prompt_ids()
    logits = tiny(ids).logits
    fast = accelerate(tiny, new_adapter(tiny, tiny_config()).randomize(3))
    fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert fast.detach() is tiny
    assert digest(tiny) == before
    assert _hooks(tiny) == hooks
    assert tiny.config._attn_implementation == "sdpa"
    assert torch.equal(tiny(ids).logits, logits)
    assert not any(p.requires_grad for p in tiny.parameters())


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_config_makes_a_fresh_adapter_that_is_exact(tiny: LlamaForCausalLM) -> None:
    fast, ids = accelerate(tiny, tiny_config()), prompt_ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), tiny.generate(ids, **options))


def test_what_is_saved_is_what_is_loaded(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    ids = torch.tensor([5, 6, 7, 40, 41, 42])
    adapter = new_adapter(tiny, tiny_config(draft_vocab_size=6), draft_ids=ids).randomize(4)
    adapter.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = accelerate(tiny, tmp_path)
    assert fast.adapter.config == adapter.config
    assert torch.equal(fast.adapter.draft_ids, ids)
    for name, tensor in adapter.named_parameters():
        assert torch.equal(dict(fast.adapter.named_parameters())[name], tensor.half())
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["base"]["fingerprint"]["architecture"] == "LlamaForCausalLM"
    assert {"torch", "transformers"} <= written["versions"].keys()


def test_another_model_of_the_same_shape_is_a_warning_and_exact(tmp_path: Path) -> None:
    new_adapter(build_tiny(seed=1), tiny_config()).randomize(4).save_pretrained(tmp_path)
    other, ids = build_tiny(seed=2), prompt_ids()
    with pytest.warns(UserWarning, match="differs in weights"):
        fast = accelerate(other, tmp_path)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), other.generate(ids, **options))


def test_an_adapter_of_other_shapes_is_an_error(tiny: LlamaForCausalLM) -> None:
    adapter = new_adapter(tiny, tiny_config())
    wider = StreamAdapter(adapter.config, 48, adapter.projections())
    with pytest.raises(UsageError, match="width 48, the model's are 32 wide"):
        accelerate(tiny, wider)
    odd = StreamAdapter(adapter.config, 32, adapter.projections() | {"0.mlp.up_proj": (32, 64)})
    with pytest.raises(UsageError, match="belongs to another model"):
        accelerate(tiny, odd)
    beyond = StreamAdapter(tiny_config(draft_vocab_size=1), 32, adapter.projections(), torch.tensor([5000]))
    with pytest.raises(UsageError, match="drafts token 5000"):
        accelerate(tiny, beyond)


def test_broken_files_are_told_apart(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter folder"):
        accelerate(tiny, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"{CONFIG_FILE} is missing"):
        accelerate(tiny, tmp_path)
    new_adapter(tiny, tiny_config()).save_pretrained(tmp_path)
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UsageError, match="broken or cut short"):
        accelerate(tiny, tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    written = (tmp_path / CONFIG_FILE).read_text()
    no_width = json.loads(written)
    no_width["projections"] = {name: [0, 0] for name in no_width["projections"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(no_width))
    with pytest.raises(UsageError, match="broken or cut short"):
        accelerate(tiny, tmp_path)
    (tmp_path / CONFIG_FILE).write_text(written[:40])
    with pytest.raises(UsageError, match="broken or cut short"):
        accelerate(tiny, tmp_path)


def test_configs_of_before_are_read() -> None:
    """As earlier versions saved them: other names, one field that is gone, some that were not there yet."""
    found = AdapterConfig.from_dict({"num_streams": 3, "told_rank": 7, "start_rank": 2, "tree_floor": 4, "schedule": "deferred", "tree_nodes": 9})
    assert (found.num_streams, found.next_token_rank, found.init_rank, found.draft_vocab_size) == (3, 7, 2, 0)
    assert found.drafting == DraftConfig(tree_nodes=9, schedule="deferred")
    assert AdapterConfig.from_dict({"num_streams": 3}).drafting.schedule == "parallel"
    assert AdapterConfig.from_dict(found.to_dict()) == found


def test_overrides_are_checked(tiny: LlamaForCausalLM) -> None:
    adapter = new_adapter(tiny, tiny_config())
    assert accelerate(tiny, adapter, tree_nodes=3, schedule="deferred").drafting.tree_nodes == 3
    for override, rule in (
        ({"tree_nodes": 0}, "tree_nodes must be at least 1"),
        ({"pruning_floor": 1.0}, "pruning_floor must be at least 0 and below 1, got 1.0"),
        ({"schedule": "x"}, "schedule must be one of"),
        ({"speed": 2}, "got speed"),
    ):
        with pytest.raises(UsageError, match=rule):
            accelerate(tiny, adapter, **override)  # type: ignore[arg-type]


def test_what_a_broken_config_asks_for_takes_no_memory(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    new_adapter(tiny, tiny_config()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    written["streaming"]["transition_rank"] = 10**9  # 128 GB, if it were laid out
    (tmp_path / CONFIG_FILE).write_text(json.dumps(written))
    with pytest.raises(UsageError, match="broken or cut short"):
        accelerate(tiny, tmp_path)
