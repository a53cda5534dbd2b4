"""Decoder layers in C: the same numbers as eager ones, in every pass that they serve, and only where they compute the same."""

from __future__ import annotations

import copy
import functools
import io
from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

import lossless
from lossless.adapter.compat import new_adapter
from lossless.base.fused import FusedLayer, FusedLayers, PlainForward, unfuse_plain
from lossless.base.layers import CACHE
from lossless.base.linears import draft_linear
from lossless.base.loading import freeze
from lossless.base.packed import packed_twin
from lossless.drafting.levels import FusedLevels
from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError
from lossless.generation import exactness
from lossless.generation.model import accelerate
from lossless.kernels import native
from lossless.streams import fusing
from lossless.streams.cache import RowCache
from lossless.streams.runner import StreamRunner
from lossless.streams.short import ShortPass

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both

pytestmark = pytest.mark.skipif(not native.available(), reason="no kernels on this machine: they take gcc")

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
TREE = DraftTree((5, 9, 4, 30, 7, 8), (-1, 0, 1, 0, 3, 4))
SERVED = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, initializer_range=0.2)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SIZES, initializer_range=0.2, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, initializer_range=0.2, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 192}, initializer_range=0.2)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, initializer_range=0.2)),
}
LEFT_ALONE = {
    "a window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=9)),
    "another activation": (LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu")),
    "heads of another size": (LlamaForCausalLM, LlamaConfig(**SIZES | {"head_dim": 16})),
}
COMPUTES_OTHERWISE = {
    "factors": (GraniteForCausalLM, GraniteConfig(**SIZES, residual_multiplier=0.3, attention_multiplier=0.2)),
    "layers without positions": (SmolLM3ForCausalLM, SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0], initializer_range=0.2)),
}


def made(kind: Any, config: Any, bits: int = 32) -> Any:
    torch.manual_seed(0)
    model = freeze(kind(config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data = torch.randn_like(parameter) * 0.3 + ("norm" in name)
        if bits == 16:
            parameter.data = parameter.data.bfloat16().float()
    return model


def runner_of(model: Any) -> StreamRunner:
    return StreamRunner(model, new_adapter(model, tiny_config()).randomize(2), packed_twin(model))


def read(runner: StreamRunner, ids: torch.Tensor) -> tuple[torch.Tensor, RowCache]:
    """`[nodes, vocab]` of a tree behind a text whose end was accepted from a tree itself."""
    cache = RowCache(4)
    with torch.no_grad():
        runner.verify(ids, torch.arange(ids.shape[1])[None], None, cache, None)
        cache.keep(range(ids.shape[1]))
        places = torch.tensor([TREE.depths])
        for _ in range(2):
            out = runner.verify(torch.tensor([TREE.tokens]), places + cache.length, TREE.mask()[None], cache, None)
            cache.keep([0, 3, 4, 5])
    return out.logits[0], cache


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("family", SERVED)
def test_fused_layers_compute_what_the_eager_ones_do(family: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(*SERVED[family], bits), []
    fast, slow = runner_of(model), runner_of(model)
    fusing.fuse_passes(fast)
    assert fast.fused
    real = FusedLayers.__call__
    monkeypatch.setattr(FusedLayers, "__call__", lambda self, hidden, *rest: calls.append(hidden.shape[1]) or real(self, hidden, *rest))
    for length in (3, 70):
        calls.clear()
        found, cache = read(fast, prompt_ids(length))
        assert calls == [length] * 2 + [len(TREE)] * 4  # below the top, and the top
        expected, other = read(slow, prompt_ids(length))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
        for ours, theirs in zip(cache.rows, other.rows, strict=True):
            torch.testing.assert_close(ours.keys[:, :, : cache.length], theirs.keys[:, :, : cache.length], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values[:, :, : cache.length], theirs.values[:, :, : cache.length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["instance", "class", "class, later"])
def test_attention_that_somebody_replaced_is_not_gone_past(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it does the usual on short texts."""
    own = LlamaAttention.forward

    @functools.wraps(own)  # it says of itself that it is transformers'
    def patched(self: Any, hidden_states: torch.Tensor, *given: Any, **options: Any) -> Any:
        out, weights = own(self, hidden_states, *given, **options)
        return out * (1 + 0.5 * (options["position_ids"] > 130)[..., None]), weights

    if where == "class":
        monkeypatch.setattr(LlamaAttention, "forward", patched)
    model = build_tiny(seed=7, hidden=128, inner=160)
    if where == "instance":
        for layer in model.model.layers:
            layer.self_attn.forward = MethodType(patched, layer.self_attn)
    monkeypatch.setattr(exactness, "_LONG", 60)  # no probe sees a long one
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    if where == "class, later":
        assert fast.runner.fused
        monkeypatch.setattr(LlamaAttention, "forward", patched)
    expected, found = both(fast, prompt_ids(100), max_new_tokens=60)
    assert not fast.runner.fused
    assert torch.equal(expected, found)


def test_rows_of_another_width_are_refused() -> None:
    packed = lossless.pack(build_tiny(seed=8, hidden=128, inner=160))
    with pytest.raises(RuntimeError, match=r"rows must be 160 numbers wide, got \[1, 3, 4096\]"):
        packed.model.layers[0].mlp.down_proj(torch.randn(1, 3, 4096))
    with pytest.raises(RuntimeError, match="rows must be 128 numbers wide"):
        packed(inputs_embeds=torch.randn(1, 5, 4096))
    rounded = draft_linear(torch.randn(64, 128), None, torch.float32)
    with pytest.raises(RuntimeError, match="128"):
        rounded(torch.randn(2, 64))


def test_a_row_of_a_fused_pass_has_the_bits_that_it_has_alone() -> None:
    runner = runner_of(made(*SERVED["qwen3"]))
    fusing.fuse_passes(runner)
    ids, logits = prompt_ids(40), []
    for rows in (1, 5, 16):
        cache, found = RowCache(4), []
        with torch.no_grad():
            for start in range(0, 40, rows):
                some = ids[:, start : start + rows]
                found.append(runner.verify(some, torch.arange(start, start + some.shape[1])[None], None, cache, None).logits[0])
                cache.keep(range(some.shape[1]))
        logits.append(torch.cat(found))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_layers_that_look_otherwise_are_left_alone(family: str) -> None:
    runner = runner_of(made(*LEFT_ALONE[family]))
    assert not fusing.fuse(runner.layers)
    assert not any("forward" in layer.__dict__ for layer in runner.layers)


@pytest.mark.parametrize("family", COMPUTES_OTHERWISE)
def test_layers_that_look_alike_and_compute_otherwise_are_found_out(family: str) -> None:
    model = made(*COMPUTES_OTHERWISE[family])
    runner, untouched = runner_of(model), runner_of(model)
    fusing.fuse_passes(runner)
    assert not runner.fused
    assert torch.equal(read(runner, prompt_ids(9))[0], read(untouched, prompt_ids(9))[0])
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids(9))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", SERVED)
def test_answers_are_those_of_the_base(family: str, do_sample: bool, schedule: str) -> None:
    model = made(*SERVED[family])
    fast = accelerate(model, new_adapter(model, tiny_config(schedule=schedule)).randomize(2), adaptive=False)
    assert fast.guarantee.twin
    assert fast.runner.fused
    for length in (5, 60):
        expected, found = both(fast, prompt_ids(length), 3, do_sample=do_sample, max_new_tokens=40)
        assert torch.equal(expected, found)
    both_texts = torch.cat([prompt_ids(9), prompt_ids(9, 1)])
    mask = torch.ones_like(both_texts)
    mask[0, :3] = 0
    expected, found = both(fast, both_texts, 3, attention_mask=mask, do_sample=do_sample, max_new_tokens=20)
    assert expected.shape == found.shape  # of a batch nothing is promised to the bit


def test_streams_that_run_alone_go_the_short_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(*SERVED["llama"]), []
    adapter = new_adapter(model, tiny_config()).randomize(2).copy_as(torch.device("cpu"), torch.float32)  # which learns no more
    fast, slow = (StreamRunner(model, adapter, packed_twin(model)) for _ in range(2))
    fusing.fuse_streams(fast)
    assert fast.fused_streams
    real = FusedLayers.__call__
    monkeypatch.setattr(FusedLayers, "__call__", lambda self, hidden, *rest: calls.append(hidden.shape[1]) or real(self, hidden, *rest))
    found = []
    for runner in (fast, slow):
        _, cache = read(runner, prompt_ids(20))
        entry = torch.randn(1, 1, 96, generator=torch.Generator().manual_seed(1))
        context = torch.ones(1, 1, cache.length, dtype=torch.bool)
        calls.clear()
        with torch.no_grad():
            found.append(runner.speculate(entry, torch.tensor([[cache.length - 1]]), context, cache))
        assert calls == ([4] if runner is fast else [])
    assert (found[0] - found[1]).abs().max() < 0.03 * found[1].std()  # a number may be rounded to another byte
    context = torch.ones(1, 1, cache.length, dtype=torch.bool)
    context[0, 0, 3] = False  # a key that is not seen
    calls.clear()
    with torch.no_grad():
        fast.speculate(entry, torch.tensor([[cache.length - 1]]), context, cache)
    assert not calls


def test_adapters_that_learn_are_not_passed_over() -> None:
    model = made(*SERVED["llama"])
    runner = StreamRunner(model, new_adapter(model, tiny_config()).randomize(2), packed_twin(model))
    fusing.fuse_streams(runner)
    assert not runner.fused_streams
    assert not any("forward" in layer.__dict__ for layer in runner.stream_layers)


@pytest.mark.parametrize("family", COMPUTES_OTHERWISE)
def test_streams_of_layers_that_compute_otherwise_go_through_them(family: str) -> None:
    model = made(*COMPUTES_OTHERWISE[family])
    adapter = new_adapter(model, tiny_config()).randomize(2).copy_as(torch.device("cpu"), torch.float32)
    runner = StreamRunner(model, adapter)
    fusing.fuse_streams(runner)
    assert not runner.fused_streams
    assert not any("forward" in layer.__dict__ for layer in runner.stream_layers)


def test_a_layer_without_stand_ins_is_not_fused() -> None:
    model = made(*SERVED["llama"])
    assert all(FusedLayer.of(layer) is None for layer in model.model.layers)
    twin = packed_twin(model)
    twin.model.layers[1].mlp.down_proj = nn.Linear(160, 96)
    assert [FusedLayer.of(layer) is not None for layer in twin.model.layers] == [True, False, True, True]


@pytest.mark.parametrize("where", ["self_attn", "mlp", "input_layernorm", "self_attn.o_proj"])
def test_a_base_whose_parts_are_heard_is_answered_with_what_its_hooks_say(where: str) -> None:
    model = made(*SERVED["llama"])

    def louder(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 1.2, *output[1:]) if isinstance(output, tuple) else output * 1.2

    model.model.layers[1].get_submodule(where).register_forward_hook(louder)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False)
    assert not fast.runner.fused
    expected, found = both(fast, prompt_ids(9), max_new_tokens=30)
    assert torch.equal(expected, found)


def _turned(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """The same, `[batch, rows, dim]`, the other way round in rows that stand far enough behind."""
    if positions is None:  # in a trial that counts them from 0
        return hidden
    return torch.where(positions[:, -hidden.shape[1] :, None] >= 20, hidden.flip(-1), hidden)


def _heard(model: Any, where: str) -> None:
    """Somebody listens to a layer, the decoder or the model, and has it say something else once a text is long."""

    def otherwise(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _turned(output, kwargs["position_ids"])
        name = "logits" if "logits" in output else "last_hidden_state"
        output[name] = _turned(output[name], kwargs["position_ids"])
        return output

    part = model if where == "" else model.get_submodule(where)
    part.register_forward_hook(otherwise, with_kwargs=True)


@pytest.mark.parametrize("pack", [False, True], ids=["twin", "packed"])
@pytest.mark.parametrize(("where", "fused"), [("model.layers.0", False), ("model.layers.3", False), ("model", True), ("", True)])
def test_what_hooks_of_a_model_or_a_layer_say_is_heard_in_every_pass(where: str, fused: bool, pack: bool) -> None:
    model = made(*SERVED["llama"])
    if pack:
        lossless.pack(model)
    _heard(model, where)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False, exact=None if pack else "off")
    assert fast.runner.fused == fused
    assert not fused or fast.runner._short is None
    expected, found = both(fast, prompt_ids(9), max_new_tokens=40)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("family", SERVED)
def test_passes_by_the_parts_of_a_model_are_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(*SERVED[family]), []
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False)
    real = ShortPass.read
    monkeypatch.setattr(ShortPass, "read", lambda self, plan, *rest: calls.append(plan.main_rows) or real(self, plan, *rest))
    expected, found = both(fast, prompt_ids(9), max_new_tokens=40)
    assert torch.equal(expected, found)
    assert max(calls) > 1
    assert len(calls) == fast.stats.target_passes


def test_a_model_that_does_more_than_its_parts_is_called_itself() -> None:
    louder = GraniteConfig(**SIZES, initializer_range=0.2, embedding_multiplier=3.0, residual_multiplier=1.0, attention_multiplier=32**-0.5)
    model = made(GraniteForCausalLM, louder)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False)
    assert fast.runner.fused
    assert fast.runner._short is None
    expected, found = both(fast, prompt_ids(9), max_new_tokens=40)
    assert torch.equal(expected, found)


def test_a_decoder_of_somebody_s_own_is_called_itself() -> None:
    model = made(*SERVED["llama"])
    body: Any = type(model.model)

    class Later(body):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = _turned(output.last_hidden_state, kwargs["position_ids"])
            return output

    model.model.__class__ = Later
    fast = accelerate(lossless.pack(model), new_adapter(model, tiny_config()).randomize(2), adaptive=False)
    assert fast.runner.fused
    assert fast.runner._short is None
    expected, found = both(fast, prompt_ids(9), max_new_tokens=40)
    assert torch.equal(expected, found)


@pytest.mark.filterwarnings("ignore:not accelerated")
@pytest.mark.parametrize("pack", [False, True], ids=["twin", "packed"])
def test_embeddings_in_another_dtype_than_the_layers_are_not_read_as_theirs(pack: bool) -> None:
    config = copy.deepcopy(SERVED["llama"][1])
    config.tie_word_embeddings = False
    model = made(LlamaForCausalLM, config)
    model.model.embed_tokens.to(torch.bfloat16)
    if pack:
        lossless.pack(model)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False, exact="off")
    assert not fast.runner.fused or fast.runner._short is None
    assert fast.generate(prompt_ids(9), max_new_tokens=20, do_sample=False).shape == (1, 29)


def test_scores_that_are_scaled_by_where_a_row_stands_are_left_to_the_layer() -> None:
    twin = packed_twin(made(*SERVED["llama"]))
    assert FusedLayer.of(twin.model.layers[0]) is not None
    attention = twin.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.rope_parameters = {**attention.config.rope_parameters, "llama_4_scaling_beta": 0.1}
    assert FusedLayer.of(twin.model.layers[0]) is None


def test_a_forward_that_goes_past_copies_is_refused_in_one_sentence() -> None:
    model = made(*SERVED["llama"])
    own = model.model.forward
    model.model.forward = lambda *args, **kwargs: own(*args, **kwargs)  # of this very model, whoever calls it
    with pytest.raises(UsageError, match="a forward that was put in the place of its own goes past copies of its layers"):
        accelerate(model, new_adapter(model, tiny_config()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    """More than there are processors, too: they sleep where they wait for each other."""
    model = made(Qwen3ForCausalLM, Qwen3Config(**SIZES | {"hidden_size": 128, "intermediate_size": 192}, initializer_range=0.2)).to(dtype)
    fast = accelerate(model, new_adapter(model, tiny_config(transition_rank=32, draft_vocab_size=80), draft_ids=torch.arange(10, 90)).randomize(2))
    assert fast.runner.fused
    assert fast.drafter._fused is not None
    ids, found = prompt_ids(9), []
    try:
        for threads in (1, 3, 9, 9):
            torch.set_num_threads(threads)
            cache = RowCache(4, 32)
            fast.runner.verify(ids[:, :8], torch.arange(8)[None], None, cache, None)
            cache.keep(range(8))
            tree = torch.tensor([TREE.tokens])
            out = fast.runner.verify(tree, torch.tensor([TREE.depths]) + 8, TREE.mask()[None], cache, None)
            cache.keep([0])
            streams = fast.runner.speculate(out.entry[:, :1], torch.tensor([[8]]), torch.ones(1, 1, 9, dtype=torch.bool), cache)[:, 0]
            levels = FusedLevels(fast.drafter, fast.drafter._fused, fast.drafter._table, streams, None)
            likely = [levels.read(0, [], [5]), levels.read(1, [0, 0, 0], [11, 12, 13])]
            found.append((out.logits, streams, levels.r, likely))
    finally:
        torch.set_num_threads(1)
    for others in found[1:]:
        for alone, together in zip(found[0][:3], others[:3], strict=True):
            assert torch.equal(alone, together)
    assert [[list(node) for node in level] for level in found[0][3]] == [[list(node) for node in level] for level in found[1][3]]


def test_a_changed_drafting_serves_on() -> None:
    model = made(*SERVED["llama"])
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    for nodes in (1, 2, 20):
        fast.drafting = replace(fast.drafting, tree_nodes=nodes, adaptive=False)
        expected, found = both(fast, prompt_ids(9), max_new_tokens=30)
        assert torch.equal(expected, found)


def packed(family: str, dtype: torch.dtype) -> Any:
    model = lossless.pack(made(*SERVED[family]).to(dtype))
    assert all(isinstance(layer.__dict__["forward"], PlainForward) for layer in model.model.layers)
    return model


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SERVED)
def test_a_packed_model_goes_the_short_way_itself_and_is_accelerated_bit_for_bit(family: str, dtype: torch.dtype, schedule: str) -> None:
    model = packed(family, dtype)
    fast = accelerate(model, new_adapter(model, tiny_config(schedule=schedule)).randomize(2), adaptive=False)
    assert fast.reader.fused
    assert fast.guarantee.level == "bitwise"
    for do_sample, length in ((False, 5), (True, 60)):
        options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 40}
        expected, found = both(fast, prompt_ids(length), 3, **options)
        assert torch.equal(expected.sequences, found.sequences)
        assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_short_way_is_the_layers_own_but_for_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = packed("qwen3", dtype), []
    real = FusedLayer.behind
    monkeypatch.setattr(FusedLayer, "behind", lambda self, hidden, *rest: calls.append(hidden.shape[1]) or real(self, hidden, *rest))

    def logits() -> torch.Tensor:
        return torch.cat(model.generate(
            prompt_ids(9), attention_mask=torch.ones(1, 9, dtype=torch.long), max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits)  # fmt: skip

    short = logits()
    assert calls == [1] * 4 * 5
    assert torch.equal(logits(), short)
    hook = model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *_: None)
    calls.clear()
    mixed = logits()
    assert calls == [1] * 3 * 5  # somebody listens to one of the layers
    hook.remove()
    unfuse_plain(model.model.layers)
    long = logits()
    assert calls == [1] * 3 * 5
    for found in (short, mixed):
        assert (found - long).abs().max() < (1e-4 if dtype == torch.float32 else 0.2) * long.std()


def test_a_part_that_is_exchanged_is_not_passed_over() -> None:
    model, ids = packed("llama", torch.float32), prompt_ids(9)

    def logits(which: Any) -> torch.Tensor:
        cache = DynamicCache(config=which.config)
        which(ids[:, :8], **{CACHE: cache}, use_cache=True)
        return which(ids[:, 8:], **{CACHE: cache}, use_cache=True).logits

    with torch.no_grad():
        before = logits(model)
        own = model.model.layers[1].mlp.up_proj
        model.model.layers[1].mlp.up_proj = nn.Sequential(own)  # as a LoRA would stand there
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
        model.model.layers[1].mlp.up_proj = nn.Linear(96, 160)
        assert (logits(model) - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_is_undone_and_copies_are_whole(dtype: torch.dtype) -> None:
    model, ids = made(*SERVED["llama"]).to(dtype), prompt_ids(9)
    plain = model(ids).logits
    step = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    lossless.pack(model)
    expected = torch.cat(model.generate(ids, **step).logits)
    twice = copy.deepcopy(model)
    for layer, other in zip(model.model.layers, twice.model.layers, strict=True):
        assert other.__dict__["forward"].layer is other
        assert other.__dict__["forward"].fused is layer.__dict__["forward"].fused
    assert torch.equal(torch.cat(twice.generate(ids, **step).logits), expected)
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    read_again = torch.load(written, weights_only=False)
    assert (torch.cat(read_again.generate(ids, **step).logits) - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.2) * expected.std()
    lossless.unpack(model)
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("padding", [0, 3])
def test_batches_and_padding_of_a_packed_model_go_the_long_way(padding: int) -> None:
    model = packed("llama", torch.float32)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False)
    ids, mask = prompt_ids(12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :padding] = 0
    expected, found = both(fast, ids, 3, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(expected, found)
    plain = made(*SERVED["llama"]).generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(plain, found)  # float32, and no near-tie among them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", COMPUTES_OTHERWISE)
def test_a_packed_model_whose_layers_compute_otherwise_keeps_them(family: str, dtype: torch.dtype) -> None:
    model = made(*COMPUTES_OTHERWISE[family]).to(dtype)
    ids, mask = prompt_ids(9), torch.ones(1, 9, dtype=torch.long)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    lossless.pack(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    if dtype == torch.float32:  # where rounding turns no choice
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False), plain)


def test_a_forward_of_the_users_own_is_left_alone() -> None:
    model = made(*SERVED["llama"])
    layer = model.model.layers[1]
    layer.forward = own = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    lossless.pack(model)
    assert layer.forward is own
    assert "forward" not in model.model.layers[0].__dict__
