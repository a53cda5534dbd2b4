"""The accelerated model stands wherever the base does: pipelines, devices, other adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, pipeline

from lossless.adapter.compat import new_adapter
from lossless.base.loading import load_base
from lossless.generation.model import accelerate

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_pipeline(tiny_folder: Path, do_sample: bool) -> None:
    base = load_base(str(tiny_folder), "float32")
    fast = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1))
    said = []
    for model in (base.model, fast):
        pipe = pipeline("text-generation", model=model, tokenizer=base.tokenizer, device="cpu")
        torch.manual_seed(3)
        said.append(pipe("w5 w6 w7", max_new_tokens=20, do_sample=do_sample, return_full_text=False))
        torch.manual_seed(3)
        said[-1] += pipe([{"role": "user", "content": "w9 w8"}], max_new_tokens=20, do_sample=do_sample)
    assert said[0] == said[1]
    assert fast.stats.served
    assert fast.stats.tokens == 20


def same_everywhere(model: Any) -> torch.Tensor:
    """Both schedules, greedy and sampled; returns the greedy answer."""
    for schedule in ("parallel", "deferred"):
        fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), schedule=schedule)
        for do_sample in (True, False):
            expected, found = both(fast, prompt_ids(), do_sample=do_sample)
            assert torch.equal(expected, found)
            assert fast.stats.served
    return found


# transformers 5.17 takes a base whose weights wait elsewhere for one on the device "meta"
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")
def test_layers_that_accelerate_offloads(tmp_path: Path) -> None:
    model = cpu_offload(build_tiny(seed=5), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    same_everywhere(model)


def test_a_device_map_with_layers_on_disk(tmp_path: Path) -> None:
    build_tiny(seed=5).save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "off")
    same_everywhere(model)


# layers on two devices need two devices: nothing on one machine stands in for the second
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="layers on two devices need two GPUs, and this machine has fewer")
def test_layers_on_several_devices() -> None:
    parts = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    parts |= {f"model.layers.{i}": i // 2 for i in range(4)}
    model = dispatch_model(build_tiny(seed=5), parts)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids().to(0))
    assert torch.equal(expected, found)


# PEFT asks transformers for a property by a name that is on its way out
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("merged", [False, True], ids=["active", "merged"])
def test_a_base_with_a_lora_of_its_own(merged: bool) -> None:
    torch.manual_seed(7)
    plain = build_tiny(seed=5)
    before = plain.generate(prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=48, do_sample=False)
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model = wrapped.merge_and_unload() if merged else wrapped
    model.requires_grad_(False)
    assert not torch.equal(same_everywhere(model), before)  # the LoRA is at work


def test_a_model_that_is_moved_stays_accelerated() -> None:
    """`to`, `eval` and their like give the model itself: the accelerated one, of an accelerated one."""
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    assert fast.eval() is fast
    assert fast.to(torch.bfloat16) is fast
    assert model.dtype == torch.bfloat16
    expected, found = both(fast, prompt_ids())
    assert torch.equal(expected, found)
    assert fast.stats.served
