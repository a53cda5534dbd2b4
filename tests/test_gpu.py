"""What runs on a GPU: captured passes and levels, here on a double of CUDA graphs; kernels in Triton's interpreter; and, where there is a GPU,
answers on it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lossless
from lossless.adapter.compat import new_adapter
from lossless.base.layers import CACHE
from lossless.base.linears import PADDED, PADDED_MOST, PaddedLinear
from lossless.drafting.drafter import Drafter
from lossless.drafting.levels import GraphedLevels, Levels
from lossless.drafting.noise import NoiseBias
from lossless.generation import attach as attaching
from lossless.generation.limits import projections
from lossless.kernels import gpu, graphs
from lossless.kernels.graphs import Recorded
from lossless.streams import graphs as streams_graphs
from lossless.streams.attention import laid_out_alone
from lossless.streams.cache import RowCache
from lossless.streams.graphs import GraphedRunner, PiecewiseRunner
from lossless.streams.runner import StreamRunner

from .gpu_double import Pieces

SHAPE = lossless.AdapterConfig(num_streams=3, num_msa_layers=2, lora_rank=4, transition_rank=8)
TREE = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are stood in for, and there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "available", lambda: False)  # nor would what it finds here be kept for later tests
    monkeypatch.setattr(graphs, "Pieces", Pieces)
    monkeypatch.setattr(streams_graphs, "Pieces", Pieces)


def read(runner: StreamRunner) -> list[torch.Tensor]:
    """Logits and entries of a few passes behind a prompt, each of which finds what the one before it left."""
    found, cache = [], RowCache(len(runner.layers), 40)
    with torch.no_grad():
        runner.verify(torch.arange(1, 10)[None], torch.arange(9)[None], None, cache, None, last_only=True)
        cache.keep(range(9))
        for first in (5, 20):
            tree = torch.tensor([[first, 6, 7]]), torch.tensor([[0, 1, 1]]) + cache.length, TREE
            alone = torch.tensor([[first]]), torch.tensor([[cache.length]]), None
            for ids, places, mask in (tree, alone):
                out = runner.verify(ids, places, mask, cache, None)
                found += [out.logits, out.entry]
            cache.keep([0])
    return found


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("careful", [False, True])
def test_passes_in_pieces_have_the_bits_of_passes_at_once(careful: bool) -> None:
    model = llama()
    adapter = new_adapter(model, SHAPE, None)
    plain, pieces = StreamRunner(model, adapter), PiecewiseRunner(model, adapter)
    for runner in (plain, pieces) if careful else ():
        runner.keep_bits(dict.fromkeys(projections(runner.model), 1))
    for expected, found in zip(read(plain), read(pieces), strict=True):
        assert torch.equal(expected, found)
    assert pieces.recordable
    assert {shape[0] for shape in pieces._pieces} == {1, 3}
    assert len(next(iter(pieces._pieces.values()))[0].graphs) == len(model.model.layers) + 1


class _Waiting(torch.nn.Module):
    """An MLP that looks at what it is given before it goes on."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.mlp(rows) * (2 if rows.sum() > 0 else 1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("how", ["waits", "is heard", "is patched", "learns"])
def test_a_base_that_is_more_than_work_on_a_gpu_is_read_as_ever(how: str) -> None:
    model, calls = llama(), []
    mlp = model.model.layers[1].mlp
    if how == "waits":
        model.model.layers[1].mlp = _Waiting(mlp)
    elif how == "is heard":
        mlp.register_forward_hook(lambda module, args, output: calls.append(output) or output * len(calls))
    elif how == "is patched":
        forward = mlp.forward
        mlp.forward = lambda rows: calls.append(rows) or forward(rows) * len(calls)
    else:
        model.train()
    adapter = new_adapter(model, SHAPE, None)
    found = []
    for kind in (StreamRunner, PiecewiseRunner):
        calls.clear()
        found.append(read(runner := kind(model, adapter)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not runner.recordable  # type: ignore[attr-defined]


@pytest.mark.usefixtures("double")
def test_what_was_captured_takes_other_inputs() -> None:
    weight = torch.randn(4, 3)
    work = Recorded(lambda numbers, rows: (weight[numbers] @ rows,), torch.tensor([0, 1]), torch.ones(3))
    for numbers, rows in ((torch.tensor([3, 3]), torch.randn(3)), (torch.tensor([1, 2]), torch.randn(3))):
        assert torch.equal(work(numbers, rows)[0], weight[numbers] @ rows)


@pytest.mark.usefixtures("double")
def test_what_was_captured_in_inference_mode_serves_outside_of_it() -> None:
    model = llama()
    adapter = new_adapter(model, SHAPE, None)
    pieces = PiecewiseRunner(model, adapter)
    with torch.inference_mode():
        first = [each.clone() for each in read(pieces)]
    for expected, found in zip(first, read(pieces), strict=True):
        assert torch.equal(expected, found)
    assert pieces.recordable


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("sampled", [False, True])
def test_captured_levels_are_the_levels(sampled: bool) -> None:
    model = llama()
    adapter = new_adapter(model, SHAPE, None).randomize(1).requires_grad_(True)
    with torch.no_grad():
        drafter = Drafter(adapter, model.get_input_embeddings(), model.get_output_embeddings())
        captured = GraphedLevels(drafter, 4)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            streams = torch.randn(1, 3, 48, generator=generator)
            bias = NoiseBias(torch.rand(1, 3, 97, generator=generator) + 0.1, 0.7, 0) if sampled else None
            plain, levels = Levels(drafter, streams, bias), captured.begin(streams, bias)
            for ahead, (chosen, tokens) in enumerate((([], [5]), ([0, 0, 0], [7, 8, 9]), ([2, 1], [3, 4]))):
                for expected, found in zip(plain.read(ahead, chosen, tokens), levels.read(ahead, chosen, tokens), strict=True):
                    assert list(expected) == list(found)
                    assert found == pytest.approx(expected, abs=1e-5)


def test_rows_are_laid_out_as_the_bases_own_pass_has_them() -> None:
    """cuDNN knows an attention by sizes and strides, those of dimensions of one included."""
    model, seen = llama(), []

    def watch(module: Any, *tensors: torch.Tensor, **kwargs: Any) -> Any:
        seen.append([(each.shape, each.stride()) for each in tensors[:3]])
        return sdpa_attention_forward(module, *tensors, **kwargs)

    AttentionInterface.register("watched", watch)
    model.set_attn_implementation("watched")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(1, 10)[None], **{CACHE: cache}, use_cache=True)
        seen.clear()
        model(torch.tensor([[5]]), **{CACHE: cache}, use_cache=True)
    rows = torch.randn(1, 3, 6, 16).transpose(1, 2), torch.randn(1, 2, 40, 16)[:, :, :10], torch.randn(1, 2, 40, 16)[:, :, :10]
    assert [(each.shape, each.stride()) for each in laid_out_alone(rows[0][:, :, 1:2], *rows[1:])] == seen[0]


@pytest.mark.usefixtures("double")
def test_passes_in_pieces_are_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them calls attention in every layer, and each number of them is captured for itself."""
    monkeypatch.setattr(attaching, "_runner", lambda model: PiecewiseRunner)
    monkeypatch.setattr(attaching, "packed_twin", lambda base: None)
    model = llama()
    fast = lossless.accelerate(model, SHAPE, tree_nodes=32, adaptive=False)
    assert fast.attached.rows == fast.costs.rows[-1] == 8
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(fast.generate(ids, max_new_tokens=40, do_sample=False), model.generate(ids, max_new_tokens=40, do_sample=False))
    assert fast.stats.drafted > 0
    assert {shape[0] for shape in fast.runner._pieces} <= {*range(1, 9)}  # type: ignore[attr-defined]
    assert fast._holds()


@pytest.mark.parametrize("count", [1, 5, PADDED, PADDED + 3, PADDED_MOST + 1])
def test_a_padded_product_is_the_product(count: int) -> None:
    plain = torch.nn.Linear(24, 40)
    padded = PaddedLinear.over(plain.weight, plain.bias)
    rows = torch.randn(1, count, 24)
    assert padded(rows).shape == (1, count, 40)
    assert torch.allclose(padded(rows), plain(rows), atol=1e-6)
    assert padded.original().weight is plain.weight


@pytest.mark.commands
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with torch's builds for GPUs")
def test_kernels_and_a_packed_model_step_by_step(tmp_path: Path) -> None:
    own = {"TRITON_INTERPRET": "1", "LOSSLESS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "tests.interpreted"], env=os.environ | own, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "unpacked"


@pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None, reason="there is no GPU, or no bitsandbytes")
def test_answers_in_four_bits_on_a_gpu(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": "cuda"})
    fast = lossless.accelerate(model, SHAPE, tree_nodes=8, adaptive=False)
    ids = torch.randint(0, 97, (1, 9)).cuda()
    assert torch.equal(fast.generate(ids, max_new_tokens=40, do_sample=False), model.generate(ids, max_new_tokens=40, do_sample=False))
    assert fast.stats.served


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_answers_on_a_gpu(dtype: torch.dtype, packed: bool) -> None:
    model = llama(dtype).cuda()
    if packed:
        lossless.pack(model)
    fast = lossless.accelerate(model, SHAPE, tree_nodes=8, adaptive=False)
    assert isinstance(fast.reader, GraphedRunner if packed else PiecewiseRunner)
    assert fast.runner.recordable  # type: ignore[attr-defined]
    assert fast.guarantee.level in (("bitwise",) if packed else ("bitwise", "near-tie"))
    ids = torch.randint(0, 97, (1, 9)).cuda()
    for sampled in (False, True):
        answers = []
        for by in (model, fast):
            torch.manual_seed(1)
            answers.append(by.generate(ids, max_new_tokens=40, do_sample=sampled))
        assert torch.equal(*answers)
        assert fast.stats.served
    if packed:
        lossless.unpack(model)
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
