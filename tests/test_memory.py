"""What answers take in memory."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.base.loading import load_base
from lossless.base.processes import give_back_memory
from lossless.cli.parser import main
from lossless.errors import UsageError
from lossless.evaluation.memory import Trial, _most_resident, _resident
from lossless.generation import loop
from lossless.generation.model import AcceleratedModel

from .conftest import prompt_ids, tiny_config


def test_the_peak_is_seen_though_it_is_gone_afterwards() -> None:
    before = _resident()

    def work() -> None:
        taken = torch.ones(64 * 2**18)  # 64 MiB
        for _ in range(20):
            taken += 1

    assert _most_resident(work) > before + 60


@pytest.mark.parametrize(("values", "rule"), [({"answer": 0}, "answer"), ({"context": 64, "answer": 64}, "context must be above"), ({"generations": 1}, "generations")])
def test_a_trial_out_of_range(values: dict[str, int], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Trial(**values)


def test_what_a_long_prompt_took_goes_back_to_the_system(fast: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(loop, "give_back_memory", lambda: given_back.append(1))
    for length, times in ((20, 0), (600, 1)):
        fast.generate(prompt_ids(length), max_new_tokens=2, do_sample=False)
        assert len(given_back) == times


def test_what_mkl_keeps_goes_back_to_the_system() -> None:
    try:
        held = ctypes.CDLL(torch._C.__file__).mkl_serv_mem_stat
    except AttributeError:
        pytest.skip("torch was built without MKL")
    held.restype, blocks = ctypes.c_longlong, ctypes.c_int()
    torch.ones(256, 256) @ torch.ones(256, 256)
    give_back_memory()
    assert held(ctypes.byref(blocks)) == 0


@pytest.mark.commands
def test_both_sides_are_measured_in_processes_of_their_own(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = load_base(str(tiny_folder)), tmp_path / "memory.json"
    new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(tmp_path / "adapter")
    model = ["--model", str(tiny_folder), "--adapter", str(tmp_path / "adapter")]
    assert main(["memory", *model, "--context", "200", "--answer", "8", "--generations", "10", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    plain, fast = found["sides"]["plain"], found["sides"]["accelerated"]
    assert plain["twin"] == 0 < fast["twin"]
    assert all(side["peak"] >= side["loaded"] > 50 for side in (plain, fast))
    assert found["peak_ratio_without_twin"] <= found["peak_ratio"] == round(fast["peak"] / plain["peak"], 3)
    assert "times the plain model's" in capsys.readouterr().out
    assert main(["memory", *model, "--context", "100000"]) == 2
    assert "context must be at most 512" in capsys.readouterr().err
