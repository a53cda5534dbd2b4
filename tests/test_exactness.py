"""What a probe finds at attach, and that what it promises holds to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lossless.adapter.compat import new_adapter
from lossless.base.layers import as_decoding, uses_attention_interface
from lossless.base.loading import freeze
from lossless.drafting.drafter import Drafter
from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError
from lossless.generation import attach as attaching
from lossless.generation import trial, verdict
from lossless.generation.limits import _limit, find_limits
from lossless.generation.loop import DecodeLoop
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.generation.sequence import Sequence
from lossless.generation.trial import plain_pass
from lossless.streams.cache import RowCache
from lossless.streams.runner import StreamRunner

from .conformance.families import build
from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import TOKENS, Bushy, both


def attach(exact: str | None, dtype: torch.dtype = torch.float32, schedule: str = "deferred") -> AcceleratedModel:
    model = build_tiny(seed=5, hidden=64, inner=160).to(dtype)
    return accelerate(model, new_adapter(model, tiny_config(schedule=schedule)).randomize(2), exact=exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_bitwise_means_every_bit_of_the_logits(dtype: torch.dtype, schedule: str, do_sample: bool) -> None:
    fast = attach("bitwise", dtype, schedule)
    fast.drafting = replace(fast.drafting, adaptive=False)  # wide trees
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 40}
    for seed in range(3):
        expected, found = both(fast, prompt_ids(9 + seed, seed), seed, **options)
        assert torch.equal(expected.sequences, found.sequences)
        assert all(torch.equal(a, b) for a, b in zip(expected.logits, found.logits, strict=True))
        assert fast.stats.exact == "bitwise"


def test_a_mask_of_ones_pads_nothing() -> None:
    """Some versions of transformers hand one over where others hand over none."""
    fast, ids = attach("bitwise", torch.bfloat16), prompt_ids(9)

    def decode(model: object, input_ids: torch.Tensor, **prepared: object) -> object:
        loop = DecodeLoop(fast.attached, fast.drafting, fast.costs, fast.stats)
        return loop.run(input_ids, **prepared | {"attention_mask": torch.ones_like(input_ids)})  # type: ignore[arg-type]

    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 20, "do_sample": False}
    expected = fast.base.generate(ids, attention_mask=torch.ones_like(ids), **options)
    found = fast.base.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decode, **options)
    assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))


def test_bitwise_holds_on_accepted_branches_too() -> None:
    """Rows of accepted tokens stay in the cache: their bits decide later tokens."""
    fast = attach("bitwise", torch.bfloat16)
    ids = prompt_ids(6)
    answer = fast.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)[0, 6:].tolist()
    fast.attached.drafter = Bushy(answer)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 51}
    expected, found = both(fast, ids, **options)
    assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))
    assert fast.stats.target_passes == 10


def test_a_choice_too_close_to_call_is_made_again_from_rows_read_alone() -> None:
    fast = attach("near-tie")
    for guard, reread in ((0.0, False), (0.5, True), (1e9, True)):
        fast.attached.guarantee = type(fast.guarantee)("near-tie", noise=guard)
        for options in ({}, {"do_sample": True, "temperature": 0.8, "repetition_penalty": 1.2}):
            expected, found = both(fast, prompt_ids(), 3, **options)
            assert torch.equal(expected, found)
            assert (fast.stats.reread > 0) == reread
            assert fast.stats.tokens == TOKENS
    # with nothing ever sure, each position is read once in a tree of the twin's, and once alone
    assert fast.stats.reread == TOKENS - 1
    assert fast.stats.exact == "near-tie"


@pytest.mark.parametrize("cut", [{"typical_p": 0.5}, {"eta_cutoff": 0.01}, {"top_h": 0.4}], ids=str)
def test_cuts_by_the_entropy_of_all_logits_are_the_base_s_own_under_near_tie(cut: dict[str, float]) -> None:
    fast = attach("near-tie")
    with pytest.warns(UserWarning, match="cuts off by the entropy of all logits, under near-tie"):
        expected, found = both(fast, prompt_ids(), 3, do_sample=True, **cut)
    assert torch.equal(expected, found)
    assert not fast.stats.served
    bitwise = attach("bitwise")
    expected, found = both(bitwise, prompt_ids(), 3, do_sample=True, **cut)
    assert torch.equal(expected, found)
    assert bitwise.stats.served


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_rows_that_are_read_alone_have_the_bits_of_the_base_s_own(schedule: str, do_sample: bool) -> None:
    """Streams beside such a row would change its shape, and the shape its bits."""
    fast = attach("near-tie", torch.bfloat16, schedule)
    fast.drafting = replace(fast.drafting, adaptive=False)
    fast.attached.guarantee = type(fast.guarantee)("near-tie", noise=1e9)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 30}
    expected, found = both(fast, prompt_ids(11), 3, **options)
    assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))
    assert fast.stats.reread > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_pass_that_keeps_them_apart_have_the_bits_of_their_own(dtype: torch.dtype) -> None:
    fast, ids = attach("near-tie", dtype), prompt_ids(40)
    assert fast.guarantee.again == (16, 4)
    caches, found = [RowCache(3, 40), RowCache(3, 40)], []
    for cache, rows in zip(caches, (1, 16), strict=True):
        logits = []
        for start, end in [(0, 8), *((start, start + rows) for start in range(8, 40, rows))]:
            places = torch.arange(start, end)[None]
            logits.append(fast.reader.verify(ids[:, start:end], places, None, cache, None, apart=start > 0).logits[0])
            cache.keep(range(end - start))
        found.append(torch.cat(logits))
    assert torch.equal(*found)
    for ours, theirs in zip(*(cache.rows for cache in caches), strict=True):
        assert torch.equal(ours.keys[:, :, :40], theirs.keys[:, :, :40])
        assert torch.equal(ours.values[:, :, :40], theirs.values[:, :, :40])


def test_many_rows_are_read_again_in_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, ids, passes = attach("near-tie"), prompt_ids(9), list[int]()
    fast.drafting = replace(fast.drafting, adaptive=False)
    real_choose, real_verify = Sequence.choose, StreamRunner.verify

    def doubtful(self: Sequence, logits: torch.Tensor, alone: bool = True) -> tuple[int, bool] | None:
        """Every forty-third token is too close to call; nothing is before it."""
        return None if not alone and self.emitted % 43 == 42 else real_choose(self, logits, alone)

    def verify(self: StreamRunner, ids: torch.Tensor, *given: Any, **options: Any) -> Any:
        if self is fast.reader:
            passes.append(ids.shape[1])
        return real_verify(self, ids, *given, **options)

    fast.attached.guarantee = replace(fast.guarantee, noise=0.0)
    monkeypatch.setattr(Sequence, "choose", doubtful)
    monkeypatch.setattr(StreamRunner, "verify", verify)
    expected, found = both(fast, ids, max_new_tokens=90, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(expected.sequences, found.sequences)
    for place in (42, 85):
        assert torch.equal(expected.logits[place], found.logits[place])
    assert fast.runner is not fast.reader  # which reads the prompts, and again
    assert [rows for rows in passes if rows != 9] == [16, 16, 4, 4, 1, 1, 16, 16, 4, 4, 1, 1, 1]
    assert fast.stats.reread == 42 + 43


@pytest.mark.parametrize("family", ["mistral", "llama4_text", "gemma3_text", "llama"])
def test_a_row_alone_is_attended_to_as_in_the_base_s_own_loop(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask attention may round otherwise than without one, in one row of thousands: so what it is given is compared."""
    base = build(family).bfloat16()
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(2), exact="bitwise")
    calls: list[list[Any]] = [[], []]
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(which: int) -> Any:
        def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any) -> Any:
            calls[which].append((module.layer_idx, query, key, value, mask))
            return real(module, query, key, value, mask, **kwargs)

        return attend

    ids, rows, own = prompt_ids(60), RowCache(len(fast.reader.layers)), DynamicCache(config=base.config)
    for place in range(60):
        for which in (0, 1):
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy(which))
            if which:
                fast.reader.verify(ids[:, place : place + 1], torch.tensor([[place]]), None, rows, None, apart=True)
                rows.keep([0])
            else:
                with as_decoding(base):
                    plain_pass(base, [int(ids[0, place])], own)
    assert len(calls[0]) == len(calls[1]) > 0
    for (layer, *expected), (_, *found) in zip(*calls, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert (a is None) == (b is None), layer
            assert a is None or torch.equal(a, b), layer


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
def test_a_padded_prompt_has_no_bitwise_and_is_guarded(schedule: str) -> None:
    fast, ids = attach("bitwise", torch.bfloat16, schedule), prompt_ids(9)
    mask = (torch.arange(9) > 2).long()[None]
    fast.drafting = replace(fast.drafting, adaptive=False)  # whatever a row costs here
    fast.attached.guarantee = replace(fast.guarantee, noise=1e9)
    for do_sample in (False, True):
        options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 30}
        expected, found = both(fast, ids, 3, attention_mask=mask, **options)
        assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))
        assert fast.stats.exact == "near-tie"
        assert fast.stats.reread > 20
    both(fast, ids, max_new_tokens=3)
    assert fast.stats.exact == "bitwise"


def test_what_is_cut_off_by_little_is_not_taken_for_granted() -> None:
    """Top-k and the like decide who takes part in the draw; so close to their edge, a pass of another shape might decide otherwise."""

    class Noise:
        def __init__(self, noise: list[float]) -> None:
            self.noise = torch.tensor(noise)

        def at(self, text: int, like: torch.Tensor) -> torch.Tensor:
            return self.noise

        def go_on(self, text: int) -> None: ...

    def choice(noise: list[float], logits: list[float], *processors: LogitsProcessor, guard: float = 0.1) -> tuple[int, bool] | None:
        config = GenerationConfig(do_sample=True, max_length=9)
        tape: Any = Noise(noise)
        text = Sequence(0, torch.tensor([[1, 2]]), 0, 0, LogitsProcessorList(processors), StoppingCriteriaList(), config, tape, None, guard=guard)
        return text.choose(torch.tensor(logits), alone=False)

    fair, lucky_third = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.01, 1.0]
    two = TopKLogitsWarper(2)
    assert choice(fair, [3.0, 1.0, 0.95, 0.0], two) == (0, False)  # the third is nearly among the two, but would not win
    assert choice(lucky_third, [3.0, 1.0, 0.95, 0.0], two) is None  # it would
    assert choice(lucky_third, [3.0, 1.0, 0.5, 0.0], two) == (0, False)  # it is far from taking part
    lucky_second = [1.0, 0.01, 1.0, 1.0]
    assert choice(lucky_second, [3.0, 1.0, 0.95, 0.0], two) is None  # the chosen one is nearly cut off
    assert choice(lucky_second, [3.0, 1.0, 0.5, 0.0], two) == (1, False)
    # so is its rival, if a penalty has lowered the chosen one: what is chosen by is not what the base said
    penalized = [RepetitionPenaltyLogitsProcessor(1.3), TopKLogitsWarper(2)]
    assert choice([1.0, 1.0, 1.0, 12.2, 0.37], [0.0, 13.0, 0.0, 9.5, 9.47], *penalized, guard=0.077) is None
    nucleus = TopPLogitsWarper(0.9)  # of 0.6, 0.301, 0.099
    assert choice([1.0, 1.0, 0.01], [math.log(p) for p in (0.6, 0.301, 0.099)], nucleus) is None
    assert choice([1.0, 1.0, 0.01], [math.log(p) for p in (0.6, 0.36, 0.04)], nucleus) == (0, False)
    # 0.104 for it and what is below it: by itself it may be a tenth less likely, but not all of them
    unlikely, lucky = [math.log(p) for p in (0.895, *[0.0185] * 4, 0.03)], [1.0, 1.0, 1.0, 1.0, 1.0, 1e-3]
    assert choice(lucky, unlikely, nucleus) is None
    assert choice(lucky, unlikely, nucleus, guard=0.01) == (5, False)


def test_a_reread_text_goes_on_with_several_tokens_a_pass() -> None:
    fast = attach("near-tie")
    ids = prompt_ids(6)
    answer = fast.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)[0, 6:].tolist()

    class Chain(Drafter):
        def __init__(self) -> None: ...

        def trees(self, streams: torch.Tensor, roots: list[int], max_nodes: int, memories: object, *rest: object) -> list[DraftTree]:
            done = fast.stats_text()
            chain = answer[done - 1 : done + 3]
            assert chain[0] == roots[0]
            return [DraftTree(tuple(chain), tuple(range(-1, len(chain) - 1)))]

    emitted: list[int] = []

    class Counter:
        def put(self, value: torch.Tensor) -> None:
            emitted.extend(value.flatten().tolist())

        def end(self) -> None: ...

    fast.stats_text = lambda: len(emitted) - 6  # type: ignore[attr-defined]
    fast.attached.drafter = Chain()
    fast.attached.guarantee = type(fast.guarantee)("near-tie", noise=0.3)
    found = fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, streamer=Counter())
    assert found[0, 6:].tolist() == answer[:50]
    assert 0 < fast.stats.reread < 49
    assert max(fast.stats.accepted) == 4


def test_levels_and_what_is_said_of_them(tiny: LlamaForCausalLM) -> None:
    adapter = new_adapter(tiny, tiny_config()).randomize(1)
    with pytest.raises(UsageError, match="exact must be one of bitwise, near-tie, off, got 'exactly'"):
        accelerate(tiny, adapter, exact="exactly")
    off = accelerate(tiny, adapter, exact="off")
    assert off.guarantee.describe() == {"exact": "off", "rows_that_keep_bits": {}, "noise": 0.0}
    near = accelerate(tiny, adapter, exact="near-tie").guarantee
    assert (near.level, near.limits) == ("near-tie", None)
    assert 0 <= near.noise < 1e-3
    assert accelerate(tiny, adapter).guarantee.level in ("bitwise", "near-tie")


def test_a_projection_that_depends_on_its_rows_is_found_out() -> None:
    tiny = build_tiny(hidden=64, inner=160)

    class Moody(nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return super().forward(rows) + 0.004 * (rows.numel() // self.in_features > 3)

    layer = tiny.model.layers[0].mlp
    moody = Moody(64, 160, bias=False)
    moody.weight = layer.gate_proj.weight
    layer.gate_proj = moody
    assert accelerate(tiny, new_adapter(tiny, tiny_config()).randomize(1)).guarantee.level == "bitwise"  # too loud for near-tie
    limits, operations, _ = find_limits(tiny)
    assert limits[moody] <= 3
    assert operations["Moody 64x160"] == limits[moody]


class CrowdedRMSNorm(nn.Module):
    """Adds the squares of a row up in another order if it is one of several, as torch does on a GPU."""

    def __init__(self, like: Any, heads: int = 1) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.heads = like.weight, like.variance_epsilon, heads

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        squares = rows.float().pow(2)
        alone = squares.sum(-1, keepdim=True) if squares.numel() <= squares.shape[-1] * self.heads else torch.stack(squares.split(4, -1)).sum(0).sum(-1, keepdim=True)
        return self.weight * (rows.float() * torch.rsqrt(alone / rows.shape[-1] + self.variance_epsilon)).to(rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_whose_rows_hang_on_their_number_takes_them_one_by_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits a trial of some hundred rows may not show that they do."""
    monkeypatch.setattr(attaching, "exact_twin", lambda base: None)  # as on a GPU
    model: Any = build_tiny(seed=5, hidden=64, inner=160)
    for layer in model.model.layers:
        layer.input_layernorm = CrowdedRMSNorm(layer.input_layernorm)
    model.to(dtype)
    for _ in ("probed", "read back"):
        fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact="bitwise")
        assert sum(type(module) is CrowdedRMSNorm for module in fast.runner.limits or ()) == len(model.model.layers)
        assert fast.guarantee.operations["CrowdedRMSNorm"] == 1
        for seed in range(3):
            expected, found = both(fast, prompt_ids(9 + seed, seed), seed, return_dict_in_generate=True, output_logits=True, max_new_tokens=40)
            assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))


@pytest.mark.parametrize("family", ["Qwen3", "Apertus"])  # queries are normed before heads and rows change places, and behind that
def test_norms_of_queries_take_rows_one_by_one_however_heads_stand(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model: Any = freeze(getattr(transformers, f"{family}ForCausalLM")(config))
    for layer in model.model.layers:
        layer.self_attn.q_norm = CrowdedRMSNorm(layer.self_attn.q_norm, model.config.num_attention_heads)
    fast = accelerate(model, new_adapter(model, tiny_config(num_msa_layers=1)).randomize(2), exact="bitwise")
    assert sum(type(module) is CrowdedRMSNorm for module in fast.runner.limits or ()) == 3
    for seed in range(3):
        expected, found = both(fast, prompt_ids(9 + seed, seed), seed, return_dict_in_generate=True, output_logits=True, max_new_tokens=40)
        assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))


def test_a_norm_that_is_given_something_beside_rows_is_called_as_ever() -> None:
    class GatedRMSNorm(nn.Module):
        def __init__(self, like: Any) -> None:
            super().__init__()
            self.weight = like.weight

        def forward(self, rows: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            rows = rows * gate
            return self.weight * rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)  # type: ignore[no-any-return]

    class Layer(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.inner = norm

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.inner(rows, rows.sigmoid())  # type: ignore[no-any-return]

    model: Any = build_tiny(seed=5, hidden=64, inner=160)
    model.model.layers[0].input_layernorm = Layer(GatedRMSNorm(model.model.layers[0].input_layernorm))
    for exact in (None, "bitwise", "near-tie"):
        fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact=exact)
        expected, found = both(fast, prompt_ids(9), 0, max_new_tokens=30)
        assert torch.equal(expected, found)


def test_a_base_that_cannot_keep_bits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny()
    norm = type(model.model.norm)
    real = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: real(self, x) * (1 + 1e-6 * x.shape[1]))
    adapter = new_adapter(model, tiny_config()).randomize(1)
    with pytest.raises(UsageError, match="exact='bitwise' is not to be had for LlamaForCausalLM"):
        accelerate(model, adapter, exact="bitwise")
    assert accelerate(model, adapter).guarantee.level == "near-tie"


@pytest.mark.parametrize("family", ["codegen", "xglm"])
def test_attention_of_a_family_s_own_cannot_be_promised_to_keep_bits(family: str) -> None:
    """It takes the rows of a pass together: over a short tree they may keep their bits, over a longer text they do not."""
    model = build(family).bfloat16()
    if uses_attention_interface(model):
        pytest.skip(f"this version of transformers gives {family} its own attention interface")
    adapter = new_adapter(model, tiny_config()).randomize(2)
    with pytest.raises(UsageError, match="bitwise' is not to be had"):
        accelerate(model, adapter, exact="bitwise")
    fast = accelerate(model, adapter, adaptive=False)  # drafts, whatever a row costs here
    assert fast.guarantee.level == "near-tie"
    assert fast.guarantee.noise > 1e-3  # though the probe saw no bit move
    expected, found = both(fast, prompt_ids(30), 3, do_sample=True, temperature=0.3, max_new_tokens=60)
    assert torch.equal(expected, found)
    assert fast.stats.reread > 0


def test_a_base_that_computes_otherwise_over_a_tree_is_refused() -> None:
    model = build_tiny()
    model.model.layers[2].register_forward_hook(lambda layer, args, out: out.flip(1))
    with pytest.raises(UsageError, match="over a draft tree it gives other logits than in a pass of its own"):
        accelerate(model, tiny_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_text_whose_roundings_add_up_is_no_reason_to_refuse(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As those of the demo model do in bfloat16 on some processors."""
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    real, tried = trial._off, []

    def off(runner: Any, tokens: list[int]) -> float:
        tried.append(tokens)
        return real(runner, tokens) if len(tried) > 1 else 2.5

    monkeypatch.setattr(trial, "_off", off)
    if dtype == torch.float32:
        with pytest.raises(UsageError, match=r"off by 2\.5 of their spread"):
            accelerate(build_tiny(), tiny_config())
    else:
        fast = accelerate(build_tiny().to(dtype), tiny_config())
        assert fast.guarantee.level == "bitwise"
        assert len(tried) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_that_says_no_numbers_over_a_tree_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    model = build_tiny().to(dtype)
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, out: out * torch.nan if out.shape[1] == 4 else out)
    with pytest.raises(UsageError, match="off by inf of their spread"):
        accelerate(model, tiny_config())


def test_a_base_whose_layers_cannot_take_more_rows_is_refused() -> None:
    model = build_tiny()
    rows = torch.ones(1, 3, 32)
    model.model.layers[2].register_forward_hook(lambda layer, args, out: out + rows[:, : out.shape[1]])
    with pytest.raises(UsageError, match="a trial of a pass over a draft tree ended in RuntimeError: The size of tensor"):
        accelerate(model, tiny_config())


def test_nothing_is_left_behind() -> None:
    tiny = build_tiny(hidden=64, inner=160)
    before = {name: module.__dict__.get("forward") for name, module in tiny.named_modules()}
    fast = accelerate(tiny, new_adapter(tiny, tiny_config()).randomize(1), exact="bitwise")
    both(fast, prompt_ids())
    assert before == {name: module.__dict__.get("forward") for name, module in tiny.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_a_row_read_alone_is_no_better_than_the_rows_that_it_looks_back_at() -> None:
    config = GenerationConfig(max_new_tokens=20, do_sample=False)
    text = Sequence(0, prompt_ids(), 0, 0, LogitsProcessorList(), StoppingCriteriaList([MaxLengthCriteria(99)]), config, None, None, guard=0.5)
    sure, close = torch.tensor([0.0, 9.0, 0.0]), torch.tensor([1.0, 1.2, 0.0])
    text.choose_alone(sure)  # after the prompt
    assert text.choose_after(close[None], True)(0) == (1, False)  # one row over the prompt: the base's own pass
    assert text.choose_after(torch.stack([sure, close]), True)(0) == (1, False)  # a pass of two rows
    assert text.choose_after(close[None], True)(0) is None  # one row over a row of that pass
    assert text.choose_after(sure[None], True)(0) == (1, False)


def test_a_base_whose_cache_forgets_what_its_attention_would_see_is_refused() -> None:
    model = build_tiny()
    accelerate(model, tiny_config())
    model.config.sliding_window = 12  # of the cache alone: this family's attention knows of none
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    with pytest.raises(UsageError, match="a draft tree gives other logits than the model's own loop"):
        accelerate(model, tiny_config(), exact="near-tie")


@pytest.mark.parametrize(("ins", "outs"), [(32, 96), (32, 32), (48, 32), (64, 160)])
@torch.no_grad()
def test_rows_that_are_said_to_keep_their_bits_do(ins: int, outs: int) -> None:
    """In 16 bits another order of summing shows in one number of 50,000: more of them are looked at here than at attach."""
    torch.manual_seed(1)
    projection = torch.nn.Linear(ins, outs, bias=True).bfloat16()
    most = _limit(projection, torch.bfloat16, torch.device("cpu"))
    rows = torch.randn(600_000 // outs, ins).bfloat16()
    alone = torch.cat([projection(row[None]) for row in rows])
    for size in {2, 3, 4, 8, most} - set(range(most + 1, 33)) - {1}:
        assert torch.equal(torch.cat([projection(piece) for piece in rows.split(size)]), alone), (most, size)
