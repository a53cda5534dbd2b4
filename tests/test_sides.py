"""Sides: each answers as what it stands for, and says why it cannot."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from lossless.base.loading import Base, load_base
from lossless.base.packed import is_packed, pack
from lossless.errors import UsageError
from lossless.evaluation import sides as module
from lossless.evaluation.sides import SIDES, Side, rivals, stock, wanted
from lossless.evaluation.timing import Decoding

IDS = torch.tensor([[1, 5, 6, 7, 5, 6, 1]])
DECODING = Decoding(max_new_tokens=12)


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder))


def only(name: str, base: Base, **how: object) -> Side:
    [side], left_out = rivals([name], base, **how)  # type: ignore[arg-type]
    assert not left_out
    return side


def test_names_are_put_in_order_and_all_leaves_out_what_takes_minutes() -> None:
    assert wanted(["prompt-lookup", "accelerated", "stock"]) == ["stock", "accelerated", "prompt-lookup"]
    assert wanted(["all"]) == [name for name in SIDES if name not in ("compiled", "static-cache")]
    assert wanted(["compiled", "all", "static-cache"]) == list(SIDES)
    with pytest.raises(UsageError, match="got faster"):
        wanted(["accelerated", "faster"])
    with pytest.raises(UsageError, match=r"must name 'accelerated'.*got stock"):
        wanted(["stock"])
    with pytest.raises(UsageError, match="got 'faster'"):
        Side("faster", stock, "")  # type: ignore[arg-type]


@pytest.mark.parametrize("decoding", [DECODING, Decoding(12, do_sample=True, temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_prompt_lookup_notes_a_time_for_every_token(base: Base, decoding: Decoding) -> None:
    tokens, clock = only("prompt-lookup", base).answer(IDS, decoding)
    assert len(tokens) == len(clock.ticks) == 12
    assert clock.ticks == sorted(clock.ticks)
    if not decoding.do_sample:
        assert tokens == stock(base).answer(IDS, decoding)[0]


def test_another_dtype_is_loaded_once_when_it_is_first_needed(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Base] = []

    def load(*given: object, **how: object) -> Base:
        loaded.append(load_base(*given, **how))  # type: ignore[arg-type]
        return loaded[-1]

    monkeypatch.setattr(module, "load_base", load)
    side = only("plain-bfloat16", base)
    assert (side.plain, side.same_tokens, side.dtype, loaded) == (True, False, "bfloat16", [])
    answers = [side.answer(IDS, DECODING)[0] for _ in range(2)]
    assert [other.model.dtype for other in loaded] == [torch.bfloat16]
    assert base.model.dtype == torch.float32
    assert answers[0] == answers[1]
    assert answers[0] == stock(loaded[0]).answer(IDS, DECODING)[0]


def test_the_dtype_of_stock_is_not_measured_twice(base: Base) -> None:
    found, left_out = rivals(["plain-float32", "stock", "accelerated"], base)
    assert not found
    assert left_out == {"plain-float32": "the stock side is of float32 here"}


def test_what_a_packed_model_is_without_packing_is_measured_beside_it(base: Base) -> None:
    pack(base.model)
    sides, left_out = rivals(["plain-float32"], base)
    assert ([side.name for side in sides], left_out) == (["plain-float32"], {})


def test_quantized_weights_are_not_loaded_anew_in_full(base: Base) -> None:
    found, left_out = rivals(["all", "compiled", "static-cache"], base, load_in="4bit")
    assert [side.name for side in found] == ["prompt-lookup"]
    assert left_out.keys() == {"plain-float32", "plain-bfloat16", "packed-float32", "packed-bfloat16", "compiled", "static-cache", "llama.cpp"}


def test_packed_weights_answer_with_a_model_of_their_own(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[object] = []
    monkeypatch.setattr(module, "pack", lambda model: packed.append(model) or pack(model))
    monkeypatch.setattr(module, "packable", lambda dtype, ins: dtype == torch.float32)
    found, left_out = rivals(["packed-float32", "packed-bfloat16"], base)
    assert [side.name for side in found] == ["packed-float32"]
    assert left_out == {"packed-bfloat16": "weights of bfloat16 cannot be packed on this processor"}
    assert found[0].answer(IDS, DECODING)[0] == stock(base).answer(IDS, DECODING)[0]
    assert len(packed) == 1
    assert packed[0] is not base.model
    assert not is_packed(base.model)


def test_compiling_is_of_the_layers_of_a_model_of_its_own(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **_: compiled.append(layer))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    _, left_out = rivals(["compiled"], base)
    assert "needs a C++ compiler" in left_out["compiled"]
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    tokens, _ = only("compiled", base).answer(IDS, DECODING)
    assert len(compiled) == 3
    assert not set(compiled) & set(base.model.modules())
    assert tokens == stock(base).answer(IDS, DECODING)[0]


def test_a_static_cache_is_used_again_for_texts_of_other_lengths(base: Base) -> None:
    assert "on a GPU only" in rivals(["static-cache"], base)[1]["static-cache"]
    answer = module._with_static_cache(base, "float32")
    for ids in (IDS, IDS[:, :3], IDS.repeat(1, 2)):
        assert answer(ids, DECODING)[0] == stock(base).answer(ids, DECODING)[0]


def test_llama_cpp_is_left_out_with_the_reason(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: False)
    assert "not installed" in rivals(["llama.cpp"], base)[1]["llama.cpp"]
    monkeypatch.setattr(module, "_installed", lambda name: True)
    assert "--gguf" in rivals(["llama.cpp"], base)[1]["llama.cpp"]
    assert "gone.gguf" in rivals(["llama.cpp"], base, gguf=tmp_path / "gone.gguf")[1]["llama.cpp"]


def test_llama_cpp_is_asked_for_the_same(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the binding: what it is given, and where its answer ends."""
    asked: list[dict[str, object]] = []

    class Llama:
        def __init__(self, path: str, **how: object) -> None:
            asked.append({"path": path, **how})

        def reset(self) -> None:
            asked.append({"reset": True})

        def set_seed(self, seed: int) -> None:
            asked.append({"seed": seed})

        def generate(self, tokens: list[int], **how: object):  # type: ignore[no-untyped-def]
            asked.append({"tokens": tokens, **how})
            yield from [7, 8, 2, 9, 9]

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    monkeypatch.setattr(module, "_installed", lambda name: True)
    file = tmp_path / "model.gguf"
    file.touch()
    side = only("llama.cpp", base, gguf=file)
    tokens, clock = side.answer(IDS, Decoding(max_new_tokens=4, seed=5))
    assert (tokens, len(clock.ticks)) == ([7, 8, 2, 9], 4)
    assert asked[0]["n_threads"] == asked[0]["n_threads_batch"] == torch.get_num_threads()
    assert asked[0]["n_ctx"] == 4096
    assert asked[1:3] == [{"reset": True}, {"seed": 5}]
    assert asked[3] == {"tokens": IDS[0].tolist(), "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "temp": 0.0}
    base.model.generation_config.eos_token_id = [2]
    assert only("llama.cpp", base, gguf=file).answer(IDS, DECODING)[0] == [7, 8, 2]


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or "LOSSLESS_TEST_GGUF" not in os.environ,
    reason="needs llama-cpp-python and a GGUF file in LOSSLESS_TEST_GGUF",
)
def test_llama_cpp_answers() -> None:
    file = os.environ["LOSSLESS_TEST_GGUF"]
    base = load_base(file, "float32")
    ids = torch.tensor([base.tokenizer("Why does bread rise?")["input_ids"]])
    tokens, clock = only("llama.cpp", base).answer(ids, DECODING)
    assert 1 <= len(tokens) == len(clock.ticks) <= 12
