"""The commands: the whole path on a tiny model, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.adapter.weights import StreamAdapter
from lossless.base.loading import load_base
from lossless.cli import training
from lossless.cli.parser import _parser, _renamed, main
from lossless.distillation.answers import Answers
from lossless.evaluation import sides
from lossless.generation import attach
from lossless.generation.model import AcceleratedModel
from lossless.kernels import products

from .conftest import tiny_config


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random numbers for the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    base = load_base(str(tiny_folder))
    new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{i} w{2 * i}", "category": "ab"[i % 2]}) + "\n" for i in range(40)))
    return path


def test_compare_and_generate(tiny_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(tiny_folder), "--adapter", str(adapter), "--prompt", "w1 w2", "--max-new-tokens", "12"]
    assert main(["compare", *common, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "identical: all 12 tokens" in printed
    assert "acceptance length" in printed
    assert "times as fast as the stock model.generate of this model" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["prompts"], found["identical"], found["adapter"]) == (1, 1, str(adapter))
    assert main(["generate", *common]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == found["runs"][0]["answer"].split()
    assert "12 tokens" in captured.err


@pytest.mark.skipif(not products.packable(torch.float32), reason="torch packs no float32 weights on this machine")
def test_a_packed_model_is_what_answers_are_compared_with(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    common = ["--model", str(tiny_folder), "--adapter", str(adapter), "--dtype", "float32", "--prompt", "w1 w2"]
    assert main(["compare", *common, "--pack", "--max-new-tokens", "12", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["packed"], found["identical"]) == (True, 1)
    assert any(kind.startswith("PackedLinear") for kind in found["guarantee"]["rows_that_keep_bits"])


@pytest.mark.parametrize("options", [[], ["--pack"]])
def test_who_has_packed_weights_is_not_told_to_pack(
    tiny_folder: Path, adapter: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["compare", "--model", str(tiny_folder), "--adapter", str(adapter), "--dtype", "float32", "--prompt", "w1", "--max-new-tokens", "4"]
    main([*ask, *options])
    assert "with --pack" not in capsys.readouterr().err


def test_who_could_pack_and_has_no_twin_is_told_so(
    tiny_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attach, "packed_twin", lambda model: None)
    assert main(["compare", "--model", str(tiny_folder), "--adapter", str(adapter), "--dtype", "float32", "--prompt", "w1", "--max-new-tokens", "4"]) == 0
    assert "with --pack" in capsys.readouterr().err


def test_the_doctor_tells_what_steps_cost(tiny_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--refresh"], ["--pack"]):
        assert main(["doctor", "--model", str(tiny_folder), "--dtype", "float32", "--adapter", str(adapter), *more]) == 0
        said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert said["exact"] in ("bitwise", "near-tie")
        assert said["plain"].startswith("token")
        assert "1: " in said["pass"]
        assert "streams" in said["drafting"]


@pytest.mark.parametrize("trained", [False, True], ids=["before training", "with an adapter"])
def test_a_forecast(tiny_folder: Path, adapter: Path, trained: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["forecast", "--model", str(tiny_folder), "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert main([*arguments, *(["--adapter", str(adapter)] if trained else [])]) == 0
    assert "break-even" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["curve"]["rows"][0] == 1
    assert found["model"] == str(tiny_folder)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_of_random_numbers_changes_no_token(tiny_folder: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--model", str(tiny_folder), "--adapter", "random", "--no-recall", "--prompts", str(prompts),
                 "--limit", "2", "--max-new-tokens", "10", "--dtype", "float32", "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["identical"], found["adapter"], found["recall"]) == (2, "random", False)


def test_bench_writes_what_the_contract_says(tiny_folder: Path, adapter: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--model", str(tiny_folder), "--adapter", str(adapter), "--prompts", str(prompts), "--limit", "4",
                 "--max-new-tokens", "10", "--dtype", "float32", "--do-sample", "--temperature", "0.8", "--top-p", "0.9",
                 "--seed", "5", "--tree-nodes", "6", "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["prompts"] == found["identical"] == len(found["runs"]) == 4
    assert found["categories"].keys() == {"a", "b"}
    assert found["decoding"]["seed"] == 5
    assert found["tree_nodes"] == 6
    assert {"torch", "transformers"} <= found["versions"].keys()
    assert main([*arguments[:-1], str(tmp_path / "alone.json"), "--no-plain"]) == 0
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert (alone["identical"], alone["acceptance_length"]) == (None, found["acceptance_length"])
    assert list(alone["sides"]) == ["accelerated"]


def test_bench_measures_the_sides_that_are_named_and_draws_them(
    tiny_folder: Path, adapter: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--model", str(tiny_folder), "--adapter", str(adapter), "--prompts", str(prompts), "--limit", "3",
                 "--max-new-tokens", "10", "--sides", "accelerated", "plain-float32", "plain-bfloat16", "stock", "prompt-lookup",
                 "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "new" / "out.png")]  # fmt: skip
    assert main(arguments) == 0
    captured = capsys.readouterr()
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["sides"]) == ["stock", "accelerated", "prompt-lookup", "plain-bfloat16"]
    assert found["left_out"].keys() == {"plain-float32"}
    assert "plain-float32 is left out: the stock side is of float32 here" in captured.err
    assert found["best_plain"]["side"] in ("stock", "plain-bfloat16")
    assert found["machine"]["one_row_tokens_per_s"].keys() == {"as loaded", "float32", "bfloat16"}
    assert "its ceiling with one token a pass" in captured.out
    assert (tmp_path / "new" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_suite_says_how_long_answers_are_unless_the_caller_does(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps({"question": f"w{i}", "answer": "9"}) + "\n" for i in range(6)))
    arguments = ["bench", "--model", str(tiny_folder), "--adapter", str(adapter), "--suite", "gsm8k", "--suites", str(tmp_path),
                 "--limit", "2", "--no-plain", "--json", str(tmp_path / "out.json")]  # fmt: skip
    for given, expected in ([], 256), (["--max-new-tokens", "6"], 6):
        assert main([*arguments, *given]) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        assert (found["suite"], found["decoding"]["max_new_tokens"]) == ("gsm8k", expected)
        assert [run["id"] for run in found["runs"]] == ["gsm8k_test-1", "gsm8k_test-4"]
        assert found["categories"].keys() == {"gsm8k"}


def test_tokens_that_differ_are_exit_3(
    tiny_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sides.timed_generate

    def tampered(model, ids, decoding):  # type: ignore[no-untyped-def]
        tokens, clock = real(model, ids, decoding)
        return (tokens[::-1] if isinstance(model, AcceleratedModel) else tokens), clock

    monkeypatch.setattr(sides, "timed_generate", tampered)
    arguments = ["compare", "--model", str(tiny_folder), "--adapter", str(adapter), "--prompt", "w1", "--max-new-tokens", "9"]
    assert main(arguments) == 3
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_training_whose_tokens_differ_is_exit_3_and_one_that_drafts_otherwise_is_4(
    tiny_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = str(tmp_path / "data"), ["--model", str(tiny_folder)]
    assert main(["distill", *model, "--prompts", str(prompts), "--answer-tokens", "600", "--max-new-tokens", "20", "--out", data]) == 0
    real = training.certify
    monkeypatch.setattr(training, "certify", lambda *given: real(*given) | {"mismatches": 1})
    short = ["--steps", "1", "--num-msa-layers", "2", "--held-out", "2", "--answers-per-step", "4"]
    assert main(["train", *model, "--data", data, "--out", str(tmp_path / "out"), *short]) == 3
    monkeypatch.setattr(training, "certify", real)
    check = training.check_parity
    monkeypatch.setattr(training, "check_parity", lambda *given: check(*given) | {"agrees": False})
    assert main(["train", *model, "--data", data, "--out", str(tmp_path / "out"), *short]) == 4
    assert "WARNING: the decode loop or the saved adapter disagrees" in capsys.readouterr().err
    assert "**they do not agree**" in (tmp_path / "out" / "README.md").read_text()


def test_distil_train_bench_end_to_end(tiny_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out, model = str(tmp_path / "data"), str(tmp_path / "out"), ["--model", str(tiny_folder)]
    assert main(["distill", *model, "--prompts", str(prompts), "--self-drawn", "6", "--answer-tokens", "600",
                 "--max-new-tokens", "20", "--batch-size", "8", "--out", data]) == 0  # fmt: skip
    assert json.loads((tmp_path / "data" / "distill.json").read_text())["complete"]
    assert main(["train", *model, "--data", data, "--out", out, "--steps", "6", "--num-msa-layers", "2", "--lora-rank", "4",
                 "--transition-rank", "8", "--held-out", "4", "--eval-every", "3", "--draft-vocab-size", "40"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "held-out acceptance length" in said
    assert "are simulated for what it says" in said
    assert "mismatches          0" in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter.safetensors", "adapter_config.json", "training.json", "parity.json", "certificate.json",
            "curve.jsonl", "curve.png", "README.md"} <= written  # fmt: skip
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out" / "README.md").read_text()
    counts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert f"| all | {counts['trained_parameters']:,} (" in card
    assert sum(counts["parameters_by_part"].values()) == counts["trained_parameters"]
    assert "| up to 128 |" in card
    assert "| a |" in card
    assert f"- {prompts.name}: " in card
    assert str(prompts.parent) not in card
    assert "0 mismatches" in card
    assert main(["bench", *model, "--adapter", out, "--prompts", str(prompts), "--limit", "3", "--max-new-tokens", "16"]) == 0
    further = str(tmp_path / "further")  # of the shape that it has, without a word
    assert main(["train", *model, "--data", data, "--out", further, "--begin-from", out, "--steps", "2", "--held-out", "4"]) == 0
    assert StreamAdapter.from_pretrained(further).projections() == StreamAdapter.from_pretrained(out).projections()


def test_a_tokenizer_without_a_template_gets_plain_text_and_that_is_said(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    (bare / "chat_template.jinja").unlink()
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"turns": ["w4", "w5"]}\n')
    asked = ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "4", "--temperatures", "0", "--batch-size", "2"]
    assert main(["distill", "--model", str(bare), *asked, "--out", str(tmp_path / "d")]) == 0
    assert "has no chat template: prompts are given to it as plain text" in capsys.readouterr().err
    answers = Answers.read(tmp_path / "d")
    found = {answers[i]["id"]: answers[i] for i in range(3)}
    assert found["0/0:p-1"]["prompt_ids"] == [4, 5, 6]
    first = found["1/0:p-2"]
    assert found["1/1:p-2"]["prompt_ids"] == [*first["prompt_ids"], *(i for i in first["answer_ids"] if i > 2), 8]


def bad_inputs(folder: Path, adapter: Path, prompts: Path, tmp: Path) -> dict[str, tuple[list[str], str]]:
    """What a user may get wrong, and the word that must be in the one line that comes back."""
    wider = tmp / "wider"
    shutil.copytree(adapter, wider)
    written = json.loads((wider / "adapter_config.json").read_text())
    StreamAdapter(tiny_config(), 48, {"0.mlp.up_proj": (48, 64)}).save_pretrained(tmp / "other")
    cut = tmp / "cut"
    shutil.copytree(adapter, cut)
    (cut / "adapter.safetensors").write_bytes((cut / "adapter.safetensors").read_bytes()[:500])
    written["streaming"]["wings"] = 2
    (wider / "adapter_config.json").write_text(json.dumps(written))
    broken = tmp / "broken.jsonl"
    broken.write_text("\n\n{prompt}\n")
    model, fits = ["--model", str(folder)], ["--adapter", str(adapter)]
    ask = ["--prompt", "w1", "--max-new-tokens", "4"]
    return {
        "adapter of another model": (["compare", *model, *ask, "--adapter", str(tmp / "other")], "another model"),
        "truncated adapter": (["compare", *model, *ask, "--adapter", str(cut)], "cut short"),
        "adapter with an unknown field": (["compare", *model, *ask, "--adapter", str(wider)], "wings"),
        "no adapter": (["compare", *model, *ask], "--adapter"),
        "missing prompt file": (["bench", *model, *fits, "--prompts", str(tmp / "gone.jsonl")], "gone.jsonl"),
        "line that is not JSON": (["bench", *model, *fits, "--prompts", str(broken)], "line 3"),
        "unknown dtype": (["compare", *model, *fits, *ask, "--dtype", "float7"], "float7"),
        "empty prompt": (["compare", *model, *fits, "--prompt", " "], "empty"),
        "prompt beyond the context": (["compare", *model, *fits, "--prompt", "w1 " * 600], "context of 512"),
        "limit of none": (["bench", *model, *fits, "--prompts", str(prompts), "--limit", "0"], "limit"),
        "suite without its file": (["bench", *model, *fits, "--suite", "mt_bench", "--suites", str(tmp)], "github.com/lm-sys/FastChat"),
        "suite and file": (["bench", *model, *fits, "--suite", "mt_bench", "--prompts", str(prompts)], "not allowed with"),
        "neither suite nor file": (["bench", *model, *fits], "--prompts --suite"),
        "unknown side": (["bench", *model, *fits, "--prompts", str(prompts), "--sides", "faster"], "faster"),
        "nothing to measure": (["bench", *model, *fits, "--prompts", str(prompts), "--sides", "stock"], "'accelerated'"),
        "picture of another kind": (["bench", *model, *fits, "--prompts", str(prompts), "--plot", "out.doc"], "out.doc"),
        "unknown flag": (["compare", *model, *ask, "--faster"], "--faster"),
        "flag without a number": (["compare", *model, *ask, "--seed", "x"], "--seed"),
        "nothing to distil": (["distill", *model, "--out", str(tmp / "d")], "--prompts"),
        "no data to train on": (["train", *model, "--data", str(tmp / "none"), "--out", str(tmp / "t")], "no answers"),
        "too many layers": (["train", *model, "--data", "x", "--out", "y", "--num-streams", "0"], "num_streams"),
    }


def test_bad_input_gets_one_clear_line(
    tiny_folder: Path, adapter: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (arguments, word) in bad_inputs(tiny_folder, adapter, prompts, tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # the command line prints them; it must not die of them
            try:
                code = main(arguments)
            except SystemExit as stopped:  # argparse's way
                code = int(stopped.code or 0)
        captured = capsys.readouterr()
        assert code == 2, name
        assert word in captured.err, name
        lines = [line for line in captured.err.strip().splitlines() if "warning" not in line]
        assert len(lines) == 1, (name, captured.err)
        assert captured.out == "", name


def test_the_module_runs_and_tells_its_versions() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lossless", "--version"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0
    assert "torch" in done.stdout


@pytest.mark.filterwarnings("default:.* is now --")
def test_flags_of_before_still_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--told-rank", "3", "--share=0.5", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="is now --"):
        found = _parser().parse_args(_renamed(["train", *given]))
    assert (found.next_token_rank, found.data_fraction) == (3, 0.5)
    assert main(["train", "--model", str(tmp_path), *given]) == 2
    assert "--share is now --data-fraction" in capsys.readouterr().err
