"""Packed weights: the same numbers, the same bits for any number of rows, and nothing lost by undoing it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

import lossless
from lossless.adapter.compat import new_adapter
from lossless.base import linears
from lossless.base import packed as module
from lossless.base.linears import Int8Linear, PackedLinear, StoredLinear, draft_linear
from lossless.base.loading import freeze
from lossless.base.packed import dense, is_packed, packed_bytes, packed_twin
from lossless.base.structure import state_of, structure_of
from lossless.errors import UsageError
from lossless.generation.model import accelerate
from lossless.generation.trial import plain_pass
from lossless.kernels import native, panels, products
from lossless.streams.cache import RowCache

from .conformance.families import build
from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if linears.packable(dtype, 8)]
needs_packing = pytest.mark.skipif(not products.packable(torch.float32), reason="torch packs no float32 weights on this machine")
pytestmark = pytest.mark.skipif(not DTYPES, reason="nothing can be packed on this machine")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (192, 576), (576, 1536), (300, 1100)], ids=str)
def test_a_row_has_the_same_bits_beside_any_number_of_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    holds_beside_others(shape, dtype, 33)


def holds_beside_others(shape: tuple[int, int], dtype: torch.dtype, most: int) -> None:
    """Whether rows keep their bits in products of up to so many."""
    weight, bias, rows = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype), torch.randn(most, shape[1]).to(dtype)
    product = PackedLinear(weight, bias)
    alone = torch.cat([product(row[None, None])[0] for row in rows])
    for count in range(2, most + 1):
        assert torch.equal(torch.cat([product(some) for some in rows.split(count)]), alone), count
    expected = F.linear(rows.float(), weight.float(), bias.float())
    assert (alone.float() - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * expected.std()
    assert torch.equal(product.weight, weight)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no gcc."""
    monkeypatch.setattr(native, "available", lambda: False)


@needs_packing
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if products.packable(dtype)], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (192, 576), (576, 1536), (300, 1100)], ids=str)
def test_where_there_are_no_kernels_onednn_packs(shape: tuple[int, int], dtype: torch.dtype, without_kernels: None) -> None:
    holds_beside_others(shape, dtype, 32)  # of more, oneDNN multiplies tiles in another order
    assert isinstance(PackedLinear(torch.randn(shape).to(dtype), None).packed, products.Packed)
    model = lossless.pack(build_tiny(seed=5).to(dtype))
    assert {type(part.packed) for part in model.modules() if isinstance(part, PackedLinear)} == {products.Packed}


@needs_packing
def test_a_lone_row_stands_beside_a_copy_of_itself_where_that_keeps_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(products, "least_rows", lambda *_: 2)
    product = products.Packed.of(torch.randn(8, 4))
    real = products._multiply
    monkeypatch.setattr(products, "_multiply", lambda rows, *rest: counts.append(rows.numel() // 4) or real(rows, *rest))
    for shape in ((4,), (1, 1, 4), (1, 3, 4)):
        assert product.multiply(torch.randn(shape), None).shape == (*shape[:-1], 8)
    assert counts == [2, 2, 3]


def test_gradients_flow_to_rows_of_packed_products() -> None:
    product, rows = PackedLinear(torch.randn(8, 4), None), torch.randn(3, 4, requires_grad=True)
    product(rows).sum().backward()
    torch.testing.assert_close(rows.grad, product.weight.sum(0).expand(3, -1))


@pytest.mark.skipif(not linears.eight_bits_packable(48), reason="there are no 8-bit products on this machine")
@pytest.mark.parametrize("in_panels", [True, False])
def test_eight_bits_are_nearly_right(in_panels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (native.available() if in_panels else products.int8_packable()):
        pytest.skip("there are none of this kind on this machine")
    monkeypatch.setattr(panels, "eight_bits_available", lambda ins: in_panels)
    weight, rows = torch.randn(70, 48), torch.randn(2, 5, 48)
    weight[3] = 0
    found = draft_linear(weight, torch.ones(70), weight.dtype)
    assert isinstance(found, Int8Linear)
    assert isinstance(found.packed, panels.EightBits) == in_panels
    assert (found(rows) - F.linear(rows, weight, torch.ones(70))).abs().max() < 0.2 * weight.norm(dim=1).mean()
    assert (found.weight - weight).abs().max() < weight.abs().max() / 100
    assert found(rows.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("float_drafts", [True, False], ids=["packed", "neither"])
def test_drafts_go_without_what_is_not_there(float_drafts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "eight_bits_packable", lambda ins: False)
    monkeypatch.setattr(linears, "packable", lambda dtype, ins: float_drafts)
    weight, rows = torch.randn(6, 4), torch.randn(3, 4)
    found = draft_linear(weight, None, weight.dtype)
    assert isinstance(found, PackedLinear if float_drafts else nn.Linear)
    torch.testing.assert_close(found(rows), rows @ weight.T)


@needs_packing
def test_every_number_of_rows_is_prepared_once_for_each_kind_of_product(without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = lossless.pack(build_tiny()), []
    kinds = {(part.in_features, part.out_features) for part in model.modules() if isinstance(part, PackedLinear)}
    real = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda part, rows: seen.append((part.in_features, part.out_features, rows.shape[1])) or real(part, rows))
    module.warm_up(model, 5)
    assert sorted(seen) == sorted((*kind, count) for kind in kinds for count in range(1, 6))


@needs_packing
def test_an_operator_that_is_wrong_or_missing_is_not_used(without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (lambda rows, *_: rows.new_zeros(len(rows), 96), lambda *_: torch.ops.mkldnn._no_such_operator()):
        monkeypatch.setattr(products, "_multiply", broken)
        products.packable.cache_clear()
        assert not products.packable(torch.float32)
        assert not any(isinstance(part, PackedLinear) for part in (packed_twin(build_tiny()) or build_tiny()).modules())
    monkeypatch.undo()
    products.packable.cache_clear()
    assert products.packable(torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_packing_is_undone_bit_for_bit(family: str) -> None:
    model = freeze(build(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(part) for name, part in model.named_modules()}
    ids = prompt_ids(9)
    plain = model(ids).logits
    assert lossless.pack(model) is model
    assert is_packed(model)
    assert lossless.pack(model) is model  # again: nothing to do
    assert (model(ids).logits - plain).abs().max() < 1e-3 * plain.std()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    lossless.unpack(model)
    assert {name: type(part) for name, part in model.named_modules()} == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, plain)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_model_is_accelerated_bit_for_bit(dtype: torch.dtype, do_sample: bool) -> None:
    model = lossless.pack(build_tiny(seed=5, hidden=64, inner=160).to(dtype))
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact="bitwise")
    assert min(fast.guarantee.limits.values()) >= 16
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 40}
    expected, found = both(fast, prompt_ids(9), 3, **options)
    assert torch.equal(expected.sequences, found.sequences)
    assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))
    assert fast.runner is fast.reader


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_too_close_to_call_is_read_again_with_the_packed_model_s_own_bits(dtype: torch.dtype) -> None:
    """Several rows a pass, as if each were alone: its layers go a short way then, too."""
    base = lossless.pack(build_tiny(seed=8, hidden=128, inner=160).to(dtype))
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(2), exact="near-tie")
    rows = fast.guarantee.again[-1]
    ids, own, cache = prompt_ids(5 * rows), DynamicCache(config=base.config), RowCache(4)
    for place in range(0, 5 * rows, rows):
        alone = [plain_pass(base, [int(token)], own) for token in ids[0, place : place + rows]]
        out = fast.reader.verify(ids[:, place : place + rows], torch.arange(place, place + rows)[None], None, cache, None, last_only=True, apart=True)
        cache.keep(range(rows))
        assert torch.equal(out.logits[0, -1].float(), alone[-1])


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_of_one_token_is_read_as_the_packed_model_reads_it(length: int, do_sample: bool) -> None:
    base = lossless.pack(build_tiny(seed=8, hidden=128, inner=160).bfloat16())
    fast = accelerate(base, new_adapter(base, tiny_config()).randomize(2))
    for first in range(3, 12):
        ids = torch.arange(first, first + length)[None]
        expected, found = both(fast, ids, do_sample=do_sample, max_new_tokens=9, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(expected.sequences, found.sequences)
        assert all(torch.equal(a, b) for a, b in zip(expected.logits, found.logits, strict=True))


def test_a_packed_model_is_saved_copied_and_pickled_as_an_ordinary_one(tmp_path: Path) -> None:
    model, ids = build_tiny(seed=5), prompt_ids(9)
    plain = model(ids).logits
    lossless.pack(model)
    packed = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")(ids).logits, plain)
    assert torch.equal(copy.deepcopy(model)(ids).logits, packed)
    part = model.model.layers[0].mlp.up_proj
    assert torch.equal(pickle.loads(pickle.dumps(part)).weight, part.weight)


def test_what_cannot_be_packed_is_told() -> None:
    model = build_tiny()
    with pytest.raises(UsageError, match="no weight that can be packed"):
        lossless.pack(build_tiny().to(torch.float64))
    with pytest.raises(UsageError, match="pack\\(\\) takes a frozen model"):
        lossless.pack(build_tiny().requires_grad_(True))
    lossless.pack(model)
    with pytest.raises(UsageError, match="stay in their dtype"):
        model.to(torch.bfloat16)
    model.to("cpu")  # where they are


def test_a_twin_is_a_second_model_over_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build_tiny(seed=5), prompt_ids(9)
    before = state_of(model)
    twin = packed_twin(model)
    assert state_of(model) == before
    assert twin is not None
    plain = model(ids).logits
    assert (twin(ids).logits - plain).abs().max() < 1e-3 * plain.std()
    products_of = [part for part in model.modules() if type(part) is nn.Linear]
    assert packed_bytes(model) == sum(part.weight.nbytes for part in products_of)
    assert packed_bytes(lossless.pack(build_tiny(seed=5))) == 0
    monkeypatch.setattr(module, "free_memory", lambda device: 1e-6)
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.warns(UserWarning, match=r"packed copies of the weights take 0 MiB, and of 0 MiB that are free they may take 50%"):
        assert packed_twin(model) is None
    with pytest.raises(UsageError, match=r"pack\(\) lays out a weight anew before it lets the old one go: that takes up to 0 MiB, and 0 MiB are free"):
        lossless.pack(model)
    assert state_of(model) == before


@pytest.mark.parametrize("compiler", [True, False], ids=["kernels", "no kernels"])
def test_a_base_without_memory_for_a_twin_is_served_all_the_same(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler and not native.available():
        pytest.skip("no kernels on this machine: they take gcc")
    monkeypatch.setattr(module, "free_memory", lambda device: 0.0)
    monkeypatch.setattr(native, "available", lambda: compiler)
    model = build_tiny(seed=5)
    with pytest.warns(UserWarning, match="packed copies of the weights take"):
        fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    assert fast.guarantee.twin == (fast.runner is not fast.reader) == compiler
    stored = [part for part in fast.runner.model.modules() if isinstance(part, StoredLinear)]
    own = {id(parameter) for parameter in model.parameters()}
    assert bool(stored) == compiler
    assert all(id(part.weight) in own for part in stored)  # the weights of the base, not copies of them
    expected, found = both(fast, prompt_ids())
    assert torch.equal(expected, found)


def test_structure_is_copied_and_tensors_are_shared() -> None:
    model = build_tiny()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    twin = structure_of(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not {id(part) for part in model.modules()} & {id(part) for part in twin.modules()}
    assert twin.config is not model.config
    assert len(twin.model.layers[0]._forward_hooks) == 1
    twin.model.layers[1].register_forward_hook(lambda *_: None)
    assert not model.model.layers[1]._forward_hooks


def test_dense_weights_are_found_where_they_are() -> None:
    for family in ("llama", "gpt2"):
        model = build(family)
        for part in model.modules():
            if (found := dense(part)) is not None:
                rows = torch.randn(2, found[0].shape[1])
                torch.testing.assert_close(F.linear(rows, *found), part(rows))
    assert dense(nn.Linear(3, 4, device="meta")) is None
    assert dense(nn.Embedding(3, 4)) is None


@pytest.mark.parametrize("what", ["weights", "hook", "module", "switch"])
def test_a_base_that_was_changed_is_looked_at_again(what: str) -> None:
    """What passes run through is a copy of the structure: it must not go stale."""
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids())
    part = model.model.layers[1].mlp
    with torch.no_grad():
        if what == "weights":
            part.up_proj.weight.mul_(1.5)
        elif what == "hook":
            part.register_forward_hook(lambda module, given, output: output * 1.5)
        elif what == "module":
            part.up_proj = freeze(nn.Linear(32, 48, bias=False))  # type: ignore[arg-type]
        else:
            model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    changed, found = both(fast, prompt_ids())
    assert torch.equal(changed, found)
    assert not torch.equal(changed, expected)


def test_a_call_does_not_unpack_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lossless.pack(build_tiny(seed=5, hidden=64, inner=160))
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    for layout in (panels.Panels, products.Packed):
        monkeypatch.setattr(layout, "dense", lambda packed: pytest.fail("a packed weight was unpacked"))
    fast.generate(prompt_ids(9), max_new_tokens=5, do_sample=False)
