"""Tiny random models, and what every test of the promise needs."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub; read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests begin, too: a second thread would wait for the other worker's core

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lossless.adapter.compat import new_adapter
from lossless.adapter.config import AdapterConfig, DraftConfig
from lossless.base import linears
from lossless.base.loading import freeze
from lossless.drafting.costs import CostCurve
from lossless.generation import exactness, measure, verdict
from lossless.generation.exactness import Passes
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.storage import cache_dir

VOCAB = 96

torch.set_num_threads(1)  # tiny products are not worth a second thread, and the other core has a worker of its own


_OF_COMMANDS = {"test_older", "test_bad_input", "test_robustness", "test_cli", "test_command", "test_deployment", "test_hub", "test_interruptions", "test_quantized",
                "test_readme"}  # fmt: skip


# what is exact, and by how much, is their subject: they have passes of every size probed, and the first ones behind a long text, too
_BEHIND_LONG_TEXTS = {"test_exactness", "test_exact", "test_verdict", "test_conditions", "test_noise", "test_invariance", "test_certificate"}
_OF_EXACTNESS = {*_BEHIND_LONG_TEXTS, "test_fused", "test_packed", "test_gpu", "test_robustness", "test_lossless", "test_kernels", "test_adapter"}

_OF_COSTS = {"test_measure", "test_policy", "test_forecast", "test_bench", "test_gpu", "test_under_fire"}
_COSTS = CostCurve(1.5e-3, (1, 2, 4, 8, 16), (1.55e-3, 1.75e-3, 1.85e-3, 1.95e-3, 2e-3), 0.9e-3, 0.2e-3, context=128)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by where a test stands and what it takes."""
    for item in items:
        if "conformance" in item.path.parts:
            item.add_marker("conformance")
        if "demo" in getattr(item, "fixturenames", ()):
            item.add_marker("demo")
        if item.path.stem in _OF_COMMANDS:
            item.add_marker("commands")


@pytest.fixture(autouse=True, scope="session")
def _kept_for_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What steps of tiny models cost, and how exact they are, is kept for this session only, for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kept"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (measure, verdict):
            patch.setattr(module, "cache_dir", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _probes_are_short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where exactness is not the subject, passes of few sizes are looked at, and behind few tokens: all of it has its turn in those tests where it
    is. Families have passes of every size."""
    if request.path.stem in _BEHIND_LONG_TEXTS:
        return
    every = request.path.stem in _OF_EXACTNESS or "conformance" in request.path.parts
    folder = verdict.cache_dir() / f"behind few tokens, of {'every' if every else 'few'} sizes"
    monkeypatch.setattr(exactness, "_LONG", 60)
    monkeypatch.setattr(verdict, "cache_dir", lambda: folder)
    if not every:
        each = Passes.each
        monkeypatch.setattr(Passes, "each", lambda passes: (size for size in each(passes) if size[0] in (1, 2, 3, passes.rows)))


@pytest.fixture(autouse=True)
def _costs_are_given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not the subject, what a tiny model's steps cost here once; families are measured, each part once."""
    if "conformance" in request.path.parts:
        monkeypatch.setattr(measure, "_REPEATS", 1)
    elif request.path.stem not in _OF_COSTS:
        monkeypatch.setattr(measure, "measure", lambda *_: _COSTS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random numbers."""
    torch.manual_seed(0)


def build_tiny(seed: int = 0, attention: str = "sdpa", layers: int = 3, hidden: int = 32, inner: int = 48) -> LlamaForCausalLM:
    """A random Llama of two dozen kilobytes, scaled so that its choices are not all alike."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    return freeze(model)  # type: ignore[return-value]


def tiny_config(**changes: object) -> AdapterConfig:
    """The paper's, and a transition head: small, with full streams in every pass."""
    plain = AdapterConfig(4, 2, 4, 8, next_token_rank=0, draft_vocab_size=0, drafting=DraftConfig(tree_nodes=20, schedule="parallel"))
    return plain.changed(**changes)


@pytest.fixture
def float_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts in the base's dtype: rows of one 8-bit product share a scale, so that each depends a little on the others."""
    monkeypatch.setattr(linears, "eight_bits_packable", lambda ins: False)


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return build_tiny()


@pytest.fixture
def fast(tiny: LlamaForCausalLM) -> AcceleratedModel:
    """The tiny model with an adapter of random numbers."""
    return accelerate(tiny, new_adapter(tiny, tiny_config()).randomize(1))


def prompt_ids(length: int = 7, seed: int = 3) -> torch.Tensor:
    """`[1, length]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (1, length), generator=generator)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, with a tokenizer of words and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


def save_tiny(folder: Path) -> None:
    """The tiny model in a folder, with a tokenizer of words and a chat template."""
    build_tiny(seed=5).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 4)), "<unk>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast_tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    fast_tokenizer.save_pretrained(folder)


def save_gguf(file: Path) -> None:
    """The tiny model as a GGUF file, with a tokenizer of letters."""
    model, letters = build_tiny(seed=5), ["<unk>", "<s>", "</s>", "\u0120", "w", "\u0120w", *"0123456789"]
    words = [*letters, *(f"w{i}" for i in range(VOCAB - len(letters)))]
    config, writer = model.config, GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["\u0120 w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # whose rows stand in pairs there, as they are rotated
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def demo() -> Iterator[object]:
    """The demo model, where it is already in the cache or `LOSSLESS_TEST_DEMO=1` allows fetching it."""
    from lossless.base.loading import load_base

    converted = Path(cache_dir()) / "SmolLM2-135M-Instruct-Q4_1" / "config.json"
    if not converted.is_file() and os.environ.get("LOSSLESS_TEST_DEMO") != "1":
        pytest.skip("the demo model is not in the cache: run any lossless command once, or set LOSSLESS_TEST_DEMO=1")
    return load_base("demo", "float32")
