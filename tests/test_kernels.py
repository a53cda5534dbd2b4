"""Kernels of our own: right numbers, the same bits for any number of rows, and nothing lost where they cannot be had."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lossless
from lossless.adapter.compat import new_adapter
from lossless.base.attention import GROUPED
from lossless.base.fused import unfuse_plain
from lossless.base.linears import FourBitLinear, PackedLinear, StoredLinear
from lossless.base.loading import freeze
from lossless.base.norms import fused
from lossless.base.packed import dense, is_packed, packed_twin
from lossless.errors import UsageError
from lossless.generation.model import accelerate
from lossless.kernels import native, panels

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both

needs_kernels = pytest.mark.skipif(not native.available(), reason="no kernels on this machine: they take gcc")
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if native.available() and native.has_kernels(torch.float16) else [])]


# gcc, which compiles each source once
_KEEPING = """#!/bin/sh
[ "$1" = --version ] && exec gcc --version
kept={folder}/$(echo "$*" | sed 's/-o [^ ]*//' | md5sum | cut -c1-32)
for each; do [ "$before" = -o ] && out=$each; before=$each; done
[ -e "$kept" ] || {{ gcc "$@" && cp "$out" "$kept"; }} && cp "$kept" "$out"
"""


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiler for tests of what becomes of the library."""
    folder = tmp_path_factory.mktemp("compiler")
    compiler = folder / "keeping"
    compiler.write_text(_KEEPING.format(folder=folder))
    compiler.chmod(0o755)
    return compiler


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keeping: Path) -> Iterator[Path]:
    """Kernels as in a new process, with an empty cache."""
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(native, "_FLAGS", ("-O1", *native._FLAGS[1:]))
    monkeypatch.setenv("LOSSLESS_CC", str(keeping))
    forget()
    yield tmp_path / "kernels"
    forget()


def forget() -> None:
    for cached in (native.available, native.compiled, native.panel, panels._right):
        cached.cache_clear()


@needs_kernels
def test_compiled_kernels_are_found_again_and_nothing_is_left_beside_them(afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert native.available()
    [library] = afresh.iterdir()
    made = library.stat().st_mtime_ns
    native.compiled.cache_clear()
    assert native.compiled() is not None
    assert [(path, path.stat().st_mtime_ns) for path in afresh.iterdir()] == [(library, made)]
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("lossless-")]


def four_bit_linear(outs: int, ins: int, quant_type: str = "nf4", nested: bool = False) -> Linear4bit:
    module = Linear4bit(ins, outs, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=nested)
    module.load_state_dict({"weight": torch.randn(outs, ins), "bias": torch.randn(outs)})
    return freeze(module.to("cpu"))  # quantized on its way


def four_bit_model(seed: int = 5) -> nn.Module:
    model = build_tiny(seed=seed, hidden=64, inner=128)
    for name, part in list(model.model.named_modules()):
        if type(part) is nn.Linear:
            made = Linear4bit(part.in_features, part.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
            made.load_state_dict({"weight": part.weight.data})
            model.model.set_submodule(name, made.to("cpu"))
    return freeze(model)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (70, 576), (576, 1536), (5, 16)], ids=str)
def test_a_row_has_the_same_bits_beside_any_number_of_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias, rows = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype), torch.randn(33, shape[1]).to(dtype)
    product = StoredLinear.over(nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False))
    alone = torch.cat([product(row[None, None])[0] for row in rows])
    for count in range(2, 34):
        assert torch.equal(torch.cat([product(some) for some in rows.split(count)]), alone), count
    expected = F.linear(rows.float(), weight.float(), bias.float())
    assert alone.dtype == dtype
    assert (alone.float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.03) * expected.std()
    assert torch.equal(product.original()(rows), F.linear(rows, weight, bias))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (70, 576), (576, 1536), (5, 16), (33, 6)], ids=str)
@pytest.mark.parametrize("numbers", DTYPES, ids=lambda dtype: f"numbers of {dtype}")
def test_panels_keep_a_weight_and_the_bits_of_rows(shape: tuple[int, int], dtype: torch.dtype, numbers: torch.dtype) -> None:
    weight, bias, rows = torch.randn(shape).to(numbers).to(dtype), torch.randn(shape[0]).to(dtype), torch.randn(33, shape[1])
    product = panels.Panels.of(weight)
    assert product.numbers.dtype == (numbers if dtype == torch.float32 else dtype)
    assert panels.itemsize(weight) == product.numbers.itemsize
    assert torch.equal(product.dense(), weight)
    for kind in DTYPES:
        given = rows.to(kind)
        alone = torch.cat([product.multiply(row[None, None], bias)[0] for row in given])
        for count in range(2, 34):
            assert torch.equal(torch.cat([product.multiply(some, bias) for some in given.split(count)]), alone), count
        expected = F.linear(given.float(), weight.float(), bias.float())
        assert alone.dtype == kind
        assert (alone.float() - expected).abs().max() < (1e-5 if kind == torch.float32 else 0.03) * expected.std()
    half = product.multiply(rows.half(), None)
    torch.testing.assert_close(half, (rows.half().float() @ weight.float().T).half(), rtol=1e-2, atol=1e-2)
    slanted = torch.randn(shape[1], 7).t()  # not contiguous
    torch.testing.assert_close(product.multiply(slanted, None), product.multiply(slanted.contiguous(), None))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [panels.Panels, panels.Interleaved, panels.EightBits])
def test_a_long_prompt_is_multiplied_piece_by_piece(layout: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, rows = torch.randn(70, 576).bfloat16(), torch.randn(70), torch.randn(2, 9, 576).to(dtype)
    product = layout.of(weight)
    whole = product.multiply(rows, bias)
    monkeypatch.setattr(native, "_AT_ONCE", 4)
    assert torch.equal(product.multiply(rows, bias), whole)


def in_tiles(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`[ins]` times `[outs, ins]`, in the order that tiles are added up in: of 32 inputs the even ones, the odd ones, both."""
    products, total = row.double() * weight.double(), torch.zeros(len(weight))
    for tile in products.split(32, dim=1):
        halves = [torch.zeros(len(weight)), torch.zeros(len(weight))]
        for place, product in enumerate(tile.unbind(1)):
            halves[place % 2] = (halves[place % 2].double() + product).float()
        total = total + (halves[0] + halves[1])
    return total


@pytest.mark.parametrize("shape", [(32, 32), (70, 64), (96, 608), (5, 1024)], ids=str)
def test_tiles_are_added_up_in_one_order_for_every_number_of_rows(shape: tuple[int, int]) -> None:
    if panels.tile() is None:
        pytest.skip("the processor does not multiply tiles")
    outs, ins = shape
    rows, weight, bias = torch.randn(70, ins).bfloat16(), torch.randn(shape).bfloat16(), torch.randn(outs)
    place = rows[0].abs().argmax()
    others = weight.double() @ rows[0].double() - (weight[:, place] * rows[0, place]).double()
    weight[:, place] = (-others / rows[0, place].double()).bfloat16()  # a sum of nearly 0 shows the order in which it was added up
    laid = panels.Panels.of(weight, panels.tile())
    alone = torch.cat([laid.multiply(row[None], bias) for row in rows])
    assert torch.equal(alone[:3], torch.stack([(in_tiles(row, weight) + bias).bfloat16() for row in rows[:3]]))
    for count in (2, 15, 16, 17, 31, 32, 33, 70):
        assert torch.equal(laid.multiply(rows[:count], bias), alone[:count])
    assert torch.equal(laid.dense(), weight)


@needs_kernels
def test_a_sum_that_is_no_number_stays_none() -> None:
    rows = torch.ones(2, 32).bfloat16()
    rows[1, 3] = torch.nan
    found = panels.Panels.of(torch.randn(40, 32).bfloat16()).multiply(rows, None)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@needs_kernels
@pytest.mark.parametrize("count", [native._MANY - 1, native._MANY])
def test_many_rows_are_multiplied_by_torch_with_weights_as_they_are_stored(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = F.linear
    monkeypatch.setattr(native.F, "linear", lambda rows, *rest: calls.append(len(rows)) or real(rows, *rest))
    weight, rows = torch.randn(8, 64), torch.randn(count, 64)
    torch.testing.assert_close(native.linear(rows, weight, None), rows @ weight.T)
    assert calls == [count] * (count >= native._MANY)


@needs_kernels
def test_gradients_flow_to_rows_through_torch() -> None:
    stored = StoredLinear.over(nn.Parameter(torch.randn(8, 64), requires_grad=False), None)
    for product in (stored, PackedLinear(torch.randn(8, 64), None), FourBitLinear(four_bit_linear(8, 64))):
        rows = torch.randn(3, 64, requires_grad=True)
        product(rows).sum().backward()
        torch.testing.assert_close(rows.grad, product.weight.sum(0).expand(3, -1))


@needs_kernels
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("answered", [False, True], ids=["new", "has answered"])
def test_four_bits_are_those_of_bitsandbytes(quant_type: str, nested: bool, answered: bool) -> None:
    module, rows = four_bit_linear(96, 128, quant_type, nested), torch.randn(1, 9, 128)
    expected = dequantize_4bit(module.weight.data, module.weight.quant_state)  # [96, 128]
    plain = module(rows) if answered else None  # some processors have a kernel with an order of its own
    product = FourBitLinear(module)
    rounded = answered and getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    torch.testing.assert_close(product.weight, expected, rtol=0.005 if rounded else 0, atol=1e-3 if nested and rounded else 1e-6)
    found = product(rows)
    torch.testing.assert_close(found, F.linear(rows, product.weight, module.bias), rtol=1e-5, atol=1e-5)
    for count in range(1, 9):
        assert torch.equal(torch.cat([product(some) for some in rows.split(count, dim=1)], dim=1), found)
    again = product.original()
    assert torch.equal(dequantize_4bit(again.weight.data, again.weight.quant_state), product.weight) or nested
    if plain is not None:
        assert (again(rows) - plain).abs().max() < 0.05 * plain.std()
    assert dense(product)[0].shape == (96, 128)  # type: ignore[index]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("past", [0, 3, 41, 100])
def test_a_row_attends_to_its_own_path_with_the_bits_that_it_has_alone(past: int, dim: int, dtype: torch.dtype) -> None:
    heads, kv_heads, parents = 6, 2, [-1, 0, 0, 1, 1, 2, 4, 6]
    rows, paths = len(parents), []
    for node in range(rows):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    query = torch.randn(1, rows, heads, dim).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, kv_heads, past + rows + 5, dim).to(dtype)[:, :, : past + rows] for _ in range(2))
    for starts in (None, [max(0, past + len(path) - 30) for path in paths], [past] * rows):
        found = native.attend(query, key, value, 0.2, native.Paths.of(paths), starts)
        for node, path in enumerate(paths):
            seen = [*range(past), *(past + other for other in path)][0 if starts is None else starts[node] :]
            own = (query[:, :, node : node + 1], key[:, :, seen], value[:, :, seen])
            assert torch.equal(found[:, node : node + 1], native.attend(*own, 0.2, native.Paths.of([[0]]))), (node, starts)
            expected = F.scaled_dot_product_attention(*(t.float() for t in own), scale=0.2, enable_gqa=True).transpose(1, 2)
            torch.testing.assert_close(found[:, node : node + 1].float(), expected, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 37])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_norm_has_a_stand_in_with_the_same_numbers(norm: type, dim: int, dtype: torch.dtype) -> None:
    module = norm(dim, eps=1e-5)
    module.weight.data = torch.randn(dim)
    module = freeze(module.to(dtype))
    made, rows = fused(module), (3 * torch.randn(1, 9, dim)).to(dtype)
    assert made is not None
    found, expected = made(rows), module(rows)
    assert found.dtype == dtype
    assert (found.float() - expected.float()).abs().max() < (1e-5 if dtype == torch.float32 else 0.03) * expected.float().abs().max()
    assert torch.equal(torch.cat([made(row[:, None]) for row in rows.unbind(1)], dim=1), found)
    assert made.original() is module
    assert torch.equal(made(rows.double()), module(rows.double()))  # of another dtype: by the norm itself
    assert made.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(copy.deepcopy(made)(rows), found)


@needs_kernels
def test_what_is_no_such_norm_has_no_stand_in() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(hidden_states)

    assert fused(OddRMSNorm(32)) is None
    assert fused(LlamaRMSNorm(32).double()) is None
    assert fused(nn.LayerNorm(32)) is None
    assert fused(nn.RMSNorm(32)) is None  # its eps is not to be seen


@needs_kernels
def test_what_has_no_kernel_is_told_apart() -> None:
    assert not native.multipliable(8, 24, torch.float32)  # inputs in whole vectors
    assert not native.multipliable(8, 32, torch.float64)
    assert not native.multipliable(3, 32, torch.float32)
    assert not panels.available(torch.float32, 7)
    assert not panels.available(torch.float64, 8)
    assert not panels.four_bits_available(96)
    rows = torch.randn(1, 4, 2, 48)
    assert not native.attendable(rows, rows, rows)  # dimensions in whole vectors
    rows = rows[..., :32]
    assert native.attendable(rows, rows, rows)
    assert not native.attendable(rows.expand(2, -1, -1, -1), rows, rows)  # a batch
    assert not native.attendable(torch.randn(1, 4, 2, 64), torch.randn(1, 4, 2, 64), rows)  # values narrower than keys
    product = StoredLinear.over(nn.Parameter(torch.randn(8, 32).double(), requires_grad=False), None)
    torch.testing.assert_close(product(torch.ones(1, 32).double()), product.original()(torch.ones(1, 32).double()))


@needs_kernels
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_four_bit_model_is_packed_accelerated_saved_and_unpacked(do_sample: bool) -> None:
    model, ids = four_bit_model(), prompt_ids(9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = copy.deepcopy(model)(ids).logits
    lossless.pack(model)
    assert is_packed(model)
    assert sum(isinstance(part, FourBitLinear) for part in model.modules()) == 21
    assert (model(ids).logits - plain).abs().max() < 0.2 * plain.std()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    assert fast.guarantee.level == "bitwise"
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 40}
    expected, found = both(fast, ids, 3, **options)
    assert torch.equal(expected.sequences, found.sequences)
    assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))
    lossless.unpack(model)
    assert sum(isinstance(part, Linear4bit) for part in model.modules()) == 21
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert (model(ids).logits - plain).abs().max() < 0.2 * plain.std()


@needs_kernels
def test_a_four_bit_base_has_a_twin_that_decodes_as_it_multiplies() -> None:
    model = four_bit_model()
    twin = packed_twin(model)
    assert twin is not None
    assert sum(isinstance(part, FourBitLinear) for part in twin.modules()) == 21
    assert not is_packed(model)


@needs_kernels
def test_a_packed_models_attention_is_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = native.attend
    monkeypatch.setattr(native, "attend", lambda query, *rest: rows.append(query.shape[2]) or real(query, *rest))
    model = lossless.pack(build_tiny(seed=5, hidden=128, inner=160))  # heads of 32
    assert unfuse_plain(model.model.layers)  # as in a model whose layers are others
    assert model.config._attn_implementation == GROUPED
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    fast.drafting = replace(fast.drafting, adaptive=False)
    rows.clear()
    expected, found = both(fast, prompt_ids(9))
    assert torch.equal(expected, found)
    assert rows.count(1) >= 4
    assert max(rows) > 4


@needs_kernels
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_sliding_window_is_kept_to(do_sample: bool) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=128, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, sliding_window=7,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = lossless.pack(freeze(MistralForCausalLM(config)))
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    assert fast.guarantee.level == "bitwise"
    fast.drafting = replace(fast.drafting, adaptive=False)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": do_sample, "max_new_tokens": 40}
    expected, found = both(fast, prompt_ids(5), 3, **options)
    assert torch.equal(expected.sequences, found.sequences)
    assert torch.equal(torch.cat(expected.logits), torch.cat(found.logits))


@needs_kernels
def test_kernels_are_compiled_once_and_a_broken_file_is_made_anew(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available()
    (made,) = afresh.iterdir()
    when = made.stat().st_mtime_ns
    forget()
    assert native.available()
    assert made.stat().st_mtime_ns == when
    elsewhere = afresh.parent / "elsewhere"
    broken = elsewhere / "kernels" / made.name
    broken.parent.mkdir(parents=True)
    whole = made.read_bytes()
    broken.write_bytes(whole[:40_000] + bytes(4096) + whole[44_096:])  # as a crashed machine leaves it: what is loaded of that may end the process
    monkeypatch.setattr(native, "cache_dir", lambda: elsewhere)
    forget()
    assert native.available()
    assert broken.stat().st_size == made.stat().st_size
    assert list(broken.parent.iterdir()) == [broken]


@needs_kernels
def test_processes_that_begin_together_compile_once(afresh: Path, keeping: Path, tmp_path: Path) -> None:
    compiler, noted = tmp_path / "noting", tmp_path / "noted"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {noted}; exec {keeping} "$@"\n')
    compiler.chmod(0o755)
    with ThreadPoolExecutor(2) as pool:  # a lock of another open file counts as another process's
        assert len(list(pool.map(lambda _: native._load([str(compiler), *native._FLAGS], "library"), range(2)))) == 2
    assert sum("-shared" in line for line in noted.read_text().splitlines()) == 1
    assert [path.name for path in afresh.iterdir()] == ["library.so"]


@needs_kernels
def test_a_cache_that_cannot_be_written_to_costs_a_compilation(afresh: Path) -> None:
    afresh.write_text("a file where the folder would be")
    assert native.available()


@needs_kernels
def test_a_source_that_cannot_be_compiled_leaves_nothing_behind(afresh: Path, keeping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a compiler that is too old for one of them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *grids.c) exit 1;; *) exec {keeping} "$@";; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("LOSSLESS_CC", str(compiler))
    assert not native.available()
    assert not list(afresh.iterdir())
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "false"])
def test_without_a_compiler_there_are_none_and_the_rest_serves(afresh: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSLESS_CC", compiler)
    assert not native.available()
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids())
    assert torch.equal(expected, found)
    with pytest.raises(UsageError, match="4 bits \\(with gcc\\)"):
        lossless.pack(build_tiny().to(torch.float64))


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "linear", lambda rows, *_: rows.new_zeros(len(rows), 70))
    assert not native._right()
    monkeypatch.setattr(native, "multiply", lambda kind, weight, outs, rows, *_, **__: rows.new_zeros(len(rows), outs))
    assert not panels._right.__wrapped__()
