"""A twin in 16 bits with the bits of the base's own products, and a base that is served through it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lossless.adapter.compat import new_adapter
from lossless.base import exact, norms, packed
from lossless.base.exact import chunk_of, exact_twin, in_torchs_order
from lossless.base.fused import FusedLayers
from lossless.base.layers import as_decoding
from lossless.base.linears import PackedLinear
from lossless.base.loading import freeze
from lossless.base.packed import put
from lossless.drafting.tree import DraftTree
from lossless.generation import attach, verdict
from lossless.generation.limits import find_limits
from lossless.generation.model import accelerate
from lossless.generation.trial import plain_pass
from lossless.kernels import native, pages, panels
from lossless.streams.cache import RowCache

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both

DTYPES = [dtype for dtype in native.SIXTEEN if exact._some_bits(dtype, 640, 64)]
pytestmark = pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="products of bfloat16 have other bits than torch's on this machine")
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def needs_attention(dtype: torch.dtype, dim: int) -> None:
    if not exact.attends(dtype, dim):
        pytest.skip("torch's attention has another order on this machine")


@pytest.fixture
def base() -> LlamaForCausalLM:
    """Of products that are large enough for oneDNN: torch has another way with the smallest ones."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ))  # fmt: skip
    return freeze(model.bfloat16())  # type: ignore[return-value]


@of_each_dtype
@pytest.mark.parametrize("shape", [(64, 128), (200, 576), (64, 1536), (33, 2048)], ids=str)
def test_rows_have_torchs_own_bits_beside_any_number_of_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, rows = torch.randn(shape).to(dtype), torch.randn(9, shape[1]).to(dtype)
    alone = torch.cat([F.linear(row[None, None], weight)[0] for row in rows])
    product = in_torchs_order(weight)
    for count in (1, 2, 9):
        assert torch.equal(torch.cat([product.multiply(some, None) for some in rows.split(count)]), alone)
    assert torch.equal(product.dense(), weight)


def test_a_wrong_order_is_found_out() -> None:
    linear = nn.Linear(1024, 96, bias=False).bfloat16()
    chunk = chunk_of(1024)
    orders = [found for found in (None, 64, 512) if found != chunk]
    model, own = (nn.Module() for _ in range(2))
    own.head = linear
    for wrong in orders:
        model.head = PackedLinear(linear.weight, None, layout=lambda weight, wrong=wrong: panels.Panels.of(weight, wrong))
        assert _limit_of(model.head, own.head) == 0
    model.head = PackedLinear(linear.weight, None, layout=in_torchs_order)
    assert _limit_of(model.head, own.head) == 32


@of_each_dtype
def test_sums_in_another_order_are_found_out(dtype: torch.dtype) -> None:
    if not panels.interleaves(dtype, 1024):
        pytest.skip("inputs are added up one after the other on this machine")
    weight = torch.randn(96, 1024).to(dtype)
    found = panels.Interleaved.of(weight)
    swapped = found.order.view(2, -1).flip(0).flatten()  # the last two sums that meet, the other way round, are the same; so are all below
    for order, limit in ((swapped, 32), (found.order.view(-1, 4).flip(1).flatten(), 0)):
        filled = weight[:, order.long()]
        other = panels.Interleaved(panels.Panels.of(filled).numbers, 96, 1024, order.contiguous(), found.chunk)
        assert torch.equal(other.dense(), weight)
        own = nn.Linear(1024, 96, bias=False).to(dtype)
        own.weight.data = weight
        assert _limit_of(PackedLinear(weight, None, layout=lambda weight, other=other: other), own) == limit


def _limit_of(projection: Any, own: Any) -> int:
    from lossless.generation.limits import _limit

    return _limit(projection, own.weight.dtype, torch.device("cpu"), own)


@of_each_dtype
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("past", [0, 1, 15, 40, 512, 1100])
def test_a_row_attends_to_its_own_path_with_torchs_own_bits(past: int, dim: int, starts: bool, dtype: torch.dtype) -> None:
    needs_attention(dtype, dim)
    tree = [[0], [0, 1], [0, 1, 2], [0, 3], [0, 1, 4]]
    query, key, value = (torch.randn(1, heads, count, dim).to(dtype) for heads, count in ((6, 5), (2, past + 5), (2, past + 5)))
    begins = [min(past, 3 * row) for row in range(5)] if starts else [0] * 5
    found = exact.attend(query, key, value, 0.2, native.Paths.of(tree), begins if starts else None)
    for row, (path, begin) in enumerate(zip(tree, begins, strict=True)):
        seen = [*range(begin, past), *(past + node for node in path)]
        own = [each[:, :, seen].repeat_interleave(3, 1) for each in (key, value)]
        alone = F.scaled_dot_product_attention(query[:, :, row : row + 1], own[0], own[1], scale=0.2)
        assert torch.equal(found[:, row], alone[:, :, 0])


@of_each_dtype
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_sums_that_nearly_cancel_are_torchs_own_too(dim: int, dtype: torch.dtype) -> None:
    needs_attention(dtype, dim)
    for length in (*range(2, 70), 509, 510, 513, 1030, 1500):
        query, key, value = (torch.randn(1, 9, count, dim).to(dtype) for count in (1, length, length))
        value = exact.cancelling(query, key, value)
        found, own = exact.attend(query, key, value, None, native.Paths.of([[0]])), F.scaled_dot_product_attention(query, key, value)
        assert own.abs().median() < 0.02
        assert torch.equal(found, own.transpose(1, 2))


@of_each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_attention_has_torchs_bits_for_any_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    """In float16 a head's bits hang on where its thread's memory begins."""
    needs_attention(dtype, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in range(2, 40):
            query, key, value = (torch.randn(1, 9, count, 64).to(dtype) for count in (1, length, length))
            value = exact.cancelling(query, key, value)
            assert torch.equal(exact.attend(query, key, value, None, native.Paths.of([[0]])), F.scaled_dot_product_attention(query, key, value).transpose(1, 2))
    finally:
        torch.set_num_threads(before)


def test_exponentials_of_the_last_keys_are_rounded_as_torchs_are() -> None:
    """A sum of which one part is off by its last bit shows in one output of a hundred thousand."""
    needs_attention(torch.bfloat16, 64)
    generator, off = torch.Generator().manual_seed(1), 0
    for _ in range(7845):  # the last of these has an exponential that libm's expf rounds otherwise
        query, key = (torch.randn(count, generator=generator).bfloat16() for count in (64, 15 * 64))
    query, key = query.view(1, 1, 1, 64).expand(1, 64, 1, 64), key.view(1, 1, 15, 64).expand(1, 64, 15, 64)
    for _ in range(40):
        value = torch.randn(1, 64, 15, 64, generator=generator).bfloat16()
        own = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        off += int((exact.attend(query, key, value, None, native.Paths.of([[0]])) != own).sum())
    assert off == 0


@of_each_dtype
def test_only_sixteen_bits_on_a_cpu_attend_so(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 4, 2, 64).to(dtype), torch.randn(1, 2, 9, 64).to(dtype)
    assert exact.attendable(query, key, key) == exact.attends(dtype, 64)
    assert not exact.attendable(query.float(), key.float(), key.float())
    assert not exact.attendable(query[..., :24], key[..., :24], key[..., :24])


@of_each_dtype
@pytest.mark.parametrize("do_sample", [False, True])
def test_answers_are_the_base_s_own_bit_for_bit(base: LlamaForCausalLM, do_sample: bool, dtype: torch.dtype) -> None:
    base = base.to(dtype)
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), adaptive=False)
    assert fast.guarantee.level == "bitwise"
    assert fast.guarantee.twin
    assert fast.runner is not fast.reader
    assert fast.guarantee.attends_exactly == fast.runner.attends_exactly >= exact.attends(dtype, 32)  # where it does not, the base attends
    assert fast.guarantee.fused == fast.runner.fused == exact.attends(dtype, 32)
    assert set(fast.guarantee.limits or {}) <= set(fast.runner.model.modules())
    expected, found = both(fast, prompt_ids(30), 3, do_sample=do_sample, max_new_tokens=60, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(expected.sequences, found.sequences)
    assert all(torch.equal(a, b) for a, b in zip(expected.scores, found.scores, strict=True))
    assert fast.stats.drafted


@of_each_dtype
@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_attention_says_where_a_number_is_not_finite(number: float, what: str, dtype: torch.dtype) -> None:
    needs_attention(dtype, 64)
    for length in (2, 17, 70, 600):
        given = {"query": torch.randn(1, 4, 1, 64).to(dtype), "key": torch.randn(1, 2, length, 64).to(dtype), "value": torch.randn(1, 2, length, 64).to(dtype)}
        assert exact.attend(*given.values(), None, native.Paths.of([[0]])) is not None
        given[what][0, 1, -1, 5] = number
        assert exact.attend(*given.values(), None, native.Paths.of([[0]])) is None


@pytest.mark.parametrize("fused", [True, False])
def test_keys_that_overflow_have_torchs_own_attention(fused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In float16, at a token that no probe has."""
    if torch.float16 not in DTYPES:
        pytest.skip("products of float16 have other bits than torch's on this machine")
    needs_attention(torch.float16, 32)
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    if not fused:
        monkeypatch.setattr(attach, "exact_when_fused", lambda runner: False)
    torch.manual_seed(0)
    model, token = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 4000})), 3999
    layer = model.model.layers[0]
    rows = layer.input_layernorm(model.model.embed_tokens.weight[token])
    layer.self_attn.k_proj.weight.data[15] = 1300 * rows.sign()
    queries = layer.self_attn.q_proj.weight.data
    queries[31], queries[63] = queries[15], queries[47]  # the scores are infinite, and not no numbers: torch's attention goes on with those
    base = freeze(model.half())
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), adaptive=False)
    assert (fast.guarantee.level, fast.guarantee.attends_exactly, fast.guarantee.fused) == ("bitwise", True, fused)
    for seed in range(12):
        ids = torch.randint(3, 3000, (1, 40), generator=torch.Generator().manual_seed(seed))
        ids[0, 5] = token
        expected, found = both(fast, ids, max_new_tokens=20, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(expected.sequences, found.sequences)
        assert all(torch.equal(a, b) for a, b in zip(expected.logits, found.logits, strict=True))


@of_each_dtype
@pytest.mark.parametrize("right", [True, False])
def test_prompts_are_read_through_the_twin_where_they_have_the_bits_of_the_base_s(
    base: LlamaForCausalLM, dtype: torch.dtype, right: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, weight = torch.randn(64, 128).to(dtype), torch.randn(64, 128).to(dtype)
    as_alone = torch.equal(F.linear(rows, weight), torch.cat([F.linear(row[None], weight) for row in rows]))
    if not as_alone or not panels.interleaves(dtype, 128) or panels._by_lanes(dtype):
        pytest.skip("torch's own product of several rows has another order on this machine")
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    real, base = panels.Interleaved.multiply, base.to(dtype)
    if not right:
        monkeypatch.setattr(panels.Interleaved, "multiply", lambda self, rows, bias: real(self, rows, bias) * (1.01 if rows.shape[-2] > 40 else 1))
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), adaptive=False)
    assert fast.guarantee.level == "bitwise"
    assert fast.guarantee.prompts == right
    asked = []
    own = fast.reader.verify
    monkeypatch.setattr(fast.reader, "verify", lambda *args, **kwargs: asked.append(args) or own(*args, **kwargs))
    expected, found = both(fast, prompt_ids(300), max_new_tokens=30, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(expected.sequences, found.sequences)
    assert all(torch.equal(a, b) for a, b in zip(expected.scores, found.scores, strict=True))
    assert bool(asked) == (not right)


def test_the_head_of_a_prompt_has_the_bits_of_the_base_s_and_does_not_lay_out_its_weight(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), adaptive=False)
    own, head = base.lm_head, fast.reader.lm_head
    several, alone = (torch.randn(count, 7, 128).bfloat16()[:, -1:] for count in (3, 1))
    assert torch.equal(head(several), own(several))
    expected = own(alone)
    monkeypatch.setattr(F, "linear", lambda *given: pytest.fail("torch's own product"))
    assert torch.equal(head(alone), expected)
    monkeypatch.undo()
    assert "forward" not in vars(own)


def four_bit(model: LlamaForCausalLM, compute_dtype: torch.dtype, quant_type: str, nested: bool) -> LlamaForCausalLM:
    """The model as transformers quantizes one: its layers' projections, not its head."""
    for layer in model.model.layers:
        for name, linear in [(name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]:
            made = Linear4bit(linear.in_features, linear.out_features, False, compute_dtype, nested, quant_type)
            made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=nested)
            put(layer, name, made.to("cpu"))
    model.is_quantized = True
    return freeze(model)  # type: ignore[return-value]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_four_bit_rows_have_the_bits_of_bitsandbytes(dtype: torch.dtype, quant_type: str, nested: bool, base: LlamaForCausalLM) -> None:
    if dtype is torch.float32 and not panels.multiplies_pairs(128):
        pytest.skip("bitsandbytes has torch multiply in float32 on this machine: in an order that is not known here")
    model = four_bit(base.to(dtype), dtype, quant_type, nested)
    twin, rows = exact_twin(model), torch.randn(9, 128).to(dtype)
    assert twin is not None
    for name in ("q_proj", "o_proj"):
        own, ours = (which.model.layers[1].self_attn.get_submodule(name) for which in (model, twin))
        alone = torch.cat([own(row[None, None])[0] for row in rows])
        for count in (1, 2, 9):
            assert torch.equal(torch.cat([ours(some) for some in rows.split(count)]), alone)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_four_bit_base_is_served_through_bits_of_its_own(dtype: torch.dtype, do_sample: bool, base: LlamaForCausalLM) -> None:
    model = four_bit(base.to(dtype), dtype, "nf4", nested=False)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(1), adaptive=False)
    assert fast.guarantee.twin
    # the head of a model in float32 is rounded otherwise: that a guard can be wide enough for
    assert fast.guarantee.level == ("near-tie" if dtype == torch.float32 else "bitwise")
    expected, found = both(fast, prompt_ids(30), 3, do_sample=do_sample, max_new_tokens=60)
    assert torch.equal(expected, found)
    assert fast.stats.drafted


def test_attention_in_another_order_is_found_out(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    real = exact.attend
    monkeypatch.setattr(attach, "exact_when_fused", lambda runner: False)
    monkeypatch.setattr(exact, "attendable", lambda query, key, value: query.dtype is torch.bfloat16)
    monkeypatch.setattr(exact, "attend", lambda *given: real(*given) * 1.01)
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1))
    assert fast.guarantee.level == "bitwise"
    assert fast.guarantee.twin
    assert not fast.runner.attends_exactly
    expected, found = both(fast, prompt_ids(12), max_new_tokens=20)
    assert torch.equal(expected, found)


@of_each_dtype
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("dim", [16, 32, 48, 64, 576, 1040, 4096])
def test_norms_have_the_bits_of_the_module(kind: Any, dim: int, dtype: torch.dtype) -> None:
    norm = kind(dim, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1.0, 0.5)
    made = norms.exact(norm)
    assert made is not None
    rows = (torch.randn(300, dim) * 2.0 ** torch.randint(-9, 9, (300, 1))).to(dtype)
    assert torch.equal(made(rows), norm(rows))
    assert torch.equal(made(rows[None, :1]), norm(rows[None, :1]))


def test_a_norm_in_another_order_has_no_stand_in() -> None:
    class FlippedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            rows = hidden_states.float()
            return self.weight * (rows * torch.rsqrt(rows.flip(-1).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).bfloat16()

    assert norms.exact(FlippedRMSNorm(576).bfloat16()) is None
    assert norms.exact(LlamaRMSNorm(576)) is None
    assert norms.exact(LlamaRMSNorm(40).bfloat16()) is None


@of_each_dtype
@pytest.mark.parametrize(
    "build", [lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES))],
    ids=["llama", "bias", "norms of heads"],
)  # fmt: skip
def test_fused_layers_have_the_bits_of_rows_alone(build: Any, dtype: torch.dtype) -> None:
    needs_attention(dtype, 32)
    torch.manual_seed(1)
    base = build()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    base = freeze(base.to(dtype))
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1))
    assert fast.guarantee.fused
    for length in (5, 700):
        ids, rows = prompt_ids(length), RowCache(4)
        fast.reader.verify(ids, torch.arange(length)[None], None, rows, None, last_only=True)
        rows.keep(range(length))
        tree = DraftTree((3, 4, 5, 6, 7, 8), (-1, 0, 0, 1, 2, 4))
        places = torch.tensor([tree.depths]) + length
        found = fast.runner.verify(torch.tensor([tree.tokens]), places, tree.mask()[None], rows, None, apart=True).logits[0]
        for node in range(len(tree)):
            own = DynamicCache(config=base.config)
            plain_pass(base, ids[0].tolist(), own)
            path = [node]
            while tree.parents[path[0]] >= 0:
                path.insert(0, tree.parents[path[0]])
            with as_decoding(base):
                alone = [plain_pass(base, [tree.tokens[each]], own) for each in path]
            assert torch.equal(found[node].float(), alone[-1])


def test_fused_layers_that_are_wrong_are_found_out(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    real = FusedLayers.__call__
    monkeypatch.setattr(FusedLayers, "__call__", lambda self, *given: real(self, *given) * (1.01 if self.like.exactly else 1))
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1))
    assert fast.guarantee.level == "bitwise"
    assert fast.guarantee.twin
    assert not fast.runner.fused
    assert fast.runner.attends_exactly >= exact.attends(torch.bfloat16, 32)
    expected, found = both(fast, prompt_ids(12), max_new_tokens=20)
    assert torch.equal(expected, found)


def test_nothing_of_the_base_is_exchanged(base: LlamaForCausalLM) -> None:
    modules = list(base.modules())
    assert exact_twin(base) is not None
    assert list(base.modules()) == modules
    assert not any(isinstance(module, PackedLinear) for module in modules)


def test_what_is_tried_takes_no_room_among_weights_that_stay(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_SMALLEST", 1)  # so that weights of a tiny model are laid out as large ones are
    cut: list[int] = []
    real = pages._Slabs.cut
    monkeypatch.setattr(pages._Slabs, "cut", lambda self, wanted: real(self, cut.append(wanted) or wanted))  # type: ignore[func-returns-value]
    exact._some_bits.cache_clear()  # as in a process that has attached to nothing yet
    twin: Any = exact_twin(base)
    stay = [m.packed.numbers.nbytes for m in twin.modules() if isinstance(m, PackedLinear)]
    assert stay
    assert sorted(cut) == sorted(stay)


def test_a_verdict_is_kept_with_the_limits_of_the_twin(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    adapter = new_adapter(base, tiny_config()).randomize(1)
    first, again = accelerate(base, adapter), accelerate(base, adapter)
    assert again.guarantee.twin
    assert again.runner.attends_exactly == first.runner.attends_exactly
    assert again.runner.fused == first.runner.fused
    assert set(again.guarantee.limits or {}) <= set(again.runner.model.modules())
    assert sorted((again.guarantee.limits or {}).values()) == sorted((first.guarantee.limits or {}).values())
    expected, found = both(again, prompt_ids(12), max_new_tokens=20)
    assert torch.equal(expected, found)


def test_products_too_small_for_onednn_are_left_to_torch() -> None:
    base = build_tiny().bfloat16()
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1))
    assert fast.runner is fast.reader
    expected, found = both(fast, prompt_ids(12), max_new_tokens=20)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("what", ["order", "memory", "level", "dtype"])
def test_where_there_is_no_such_twin_the_base_s_own_weights_serve(what: str, base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    if what == "order":
        monkeypatch.setattr(exact, "in_torchs_order", lambda weight: panels.Panels.of(weight.flip(1)))
        monkeypatch.setattr(exact, "_some_bits", lambda dtype, ins, outs: True)
        assert min(find_limits(exact_twin(base), base)[0].values()) == 0
    if what == "memory":
        monkeypatch.setattr(packed, "free_memory", lambda device: 1e-6)
    base = base.double() if what == "dtype" else base
    with pytest.warns(UserWarning, match="packed copies of the weights take") if what == "memory" else nullcontext():
        fast = accelerate(base, new_adapter(base, tiny_config()).randomize(1), exact="near-tie" if what == "level" else None)
    assert fast.runner is fast.reader
    expected, found = both(fast, prompt_ids(12), max_new_tokens=20)
    assert torch.equal(expected, found)
