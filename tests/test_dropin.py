"""The accelerated model stands wherever the base does: pipelines, devices, other adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, pipeline

from lossless.adapter.compat import new_adapter
from lossless.base.layers import CACHE
from lossless.base.loading import load_base
from lossless.generation.model import accelerate
from lossless.kernels import grids, native, panels

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both

# PEFT asks transformers for a property by a name that is on its way out
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
    parts |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(3)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "off")
    same_everywhere(model)


# layers on two devices need two devices: nothing on one machine stands in for the second
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="layers on two devices need two GPUs, and this machine has fewer")
def test_layers_on_several_devices() -> None:
    parts = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    parts |= {f"model.layers.{i}": i // 2 for i in range(3)}
    model = dispatch_model(build_tiny(seed=5), parts)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids().to(0))
    assert torch.equal(expected, found)


@of_peft
@pytest.mark.parametrize("merged", [False, True], ids=["active", "merged"])
def test_a_base_with_a_lora_of_its_own(merged: bool) -> None:
    torch.manual_seed(7)
    plain = build_tiny(seed=5)
    before = plain.generate(prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=48, do_sample=False)
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model = wrapped.merge_and_unload() if merged else wrapped
    model.requires_grad_(False)
    assert not torch.equal(same_everywhere(model), before)  # the LoRA is at work


@of_peft
def test_a_lora_of_the_user_s_that_is_scaled_or_merged_later_is_noticed() -> None:
    torch.manual_seed(7)
    model: Any = get_peft_model(build_tiny(seed=5), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.requires_grad_(False)
    fast, said = accelerate(model, new_adapter(model, tiny_config()).randomize(2)), []
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    for change in (lambda: None, lambda: [layer.set_scale("default", 4.0) for layer in layers], model.merge_adapter, model.unmerge_adapter):
        change()
        expected, found = both(fast, prompt_ids())
        assert torch.equal(expected, found)
        said.append(expected)
    assert not torch.equal(said[0], said[1])


def _answers(fast: Any, ids: torch.Tensor, make: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the base and the accelerated model answer, and the last layer's keys of the cache that each was given."""
    found = []
    for model in (fast.base, fast):
        cache = make()
        answer = model.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=0, **{CACHE: cache}, **options)
        found.append((answer, cache.layers[-1].keys))
    return found


# rows that a passed-in cache has already, or more of them than there are of the text, are for HF to make sense of
@pytest.mark.filterwarnings("ignore:not accelerated:UserWarning")
@pytest.mark.parametrize(
    ("held", "given", "mask", "served"),
    [(11, 12, 12, True), (6, 6, 12, True), (12, 12, 12, False), (12, 8, 8, False), (6, 6, None, False), (6, 4, None, False), (6, 9, 10, False)],
)
def test_a_passed_in_cache_of_the_beginning_of_the_prompt_and_any_other(held: int, given: int, mask: int | None, served: bool) -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))

    def make() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(prompt_ids(12)[:, :held], **{CACHE: cache}, use_cache=True)
        return cache

    ids = prompt_ids(12)[:, 12 - given :] if mask == 12 else prompt_ids(given)
    options = {} if mask is None else {"attention_mask": torch.ones(1, mask, dtype=torch.long)}
    expected, found = _answers(fast, ids, make, **options)
    assert fast.stats.served == served
    assert torch.equal(expected[0], found[0])
    torch.testing.assert_close(expected[1], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:not accelerated:UserWarning")
def test_a_cache_that_is_passed_in_for_a_batch_comes_back_as_the_base_leaves_it() -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    ids = torch.cat([prompt_ids(9, seed=seed) for seed in (1, 2, 3)])
    expected, found = _answers(fast, ids, DynamicCache, attention_mask=torch.ones_like(ids), eos_token_id=list(range(30, 70)))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])


@pytest.mark.filterwarnings("ignore:not accelerated:UserWarning")
def test_a_cache_with_rules_of_its_own_goes_to_the_base() -> None:
    class Halving(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *rest: Any, **more: Any) -> Any:
            keys, values = super().update(key_states, value_states, *rest, **more)
            return keys, values * 0.5

    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = _answers(fast, prompt_ids(), Halving, attention_mask=torch.ones(1, 7, dtype=torch.long))
    assert torch.equal(expected[0], found[0])
    assert not fast.stats.served


def test_arguments_may_be_given_by_place() -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    mask = torch.ones(1, 7, dtype=torch.long)
    assert torch.equal(fast.generate(prompt_ids(), config, attention_mask=mask), model.generate(prompt_ids(), config, attention_mask=mask))
    assert fast.stats.tokens == 9
    with pytest.raises(TypeError, match="multiple values"):
        fast.generate(prompt_ids(), config, generation_config=config)


@of_peft
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_peft_in_float32_over_a_base_in_16_bits(dtype: torch.dtype) -> None:
    """As PEFT keeps them by default."""
    model: Any = get_peft_model(build_tiny(seed=5, hidden=128, inner=192).to(dtype), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.eval().requires_grad_(False)
    assert {part.weight.dtype for name, part in model.named_modules() if "lora_A.default" in name} == {torch.float32}
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids(9), max_new_tokens=30)
    assert torch.equal(expected, found)
    assert fast.stats.served


@of_peft
def test_arguments_by_place_of_a_base_in_peft() -> None:
    model: Any = get_peft_model(build_tiny(seed=5), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.requires_grad_(False)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    config, mask = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0), torch.ones(1, 7, dtype=torch.long)
    assert torch.equal(fast.generate(prompt_ids(), config, attention_mask=mask), model.generate(prompt_ids(), config, attention_mask=mask))
    assert fast.stats.served


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_default_dtype_of_torch(dtype: torch.dtype, when: str) -> None:
    """C is handed memory of its own kind, whatever torch makes tensors of."""
    model = build_tiny(seed=5, hidden=128, inner=160)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    try:
        torch.set_default_dtype(dtype)
        if when == "before":
            for probe in (native._right, panels._right.__wrapped__, grids._right.__wrapped__):
                assert probe() or not native.available()
            fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
        expected, found = both(fast, prompt_ids())
        assert torch.equal(expected, found)
        assert fast.stats.served
    finally:
        torch.set_default_dtype(torch.float32)


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
