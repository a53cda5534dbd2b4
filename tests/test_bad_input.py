"""Bad input to every command and public function: the rule and the value in one line, exit code 2, never a traceback."""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import lossless
from lossless import AdapterConfig, DraftConfig, StreamAdapter, UsageError, accelerate
from lossless.adapter.compat import new_adapter
from lossless.base.loading import load_base
from lossless.cli.parser import main
from lossless.distillation.config import DistillConfig
from lossless.distillation.prompts import from_text, parse_record, read_prompts
from lossless.evaluation.sides import wanted
from lossless.evaluation.suites import read_suite
from lossless.evaluation.timing import Decoding
from lossless.generation.model import AcceleratedModel
from lossless.storage import alone_with
from lossless.training.config import TrainConfig

from .commands import run_all
from .conftest import build_tiny, tiny_config


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, its adapter `a`, prompts `p.jsonl`, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_folder, folder / "m")
    base = load_base(str(folder / "m"))
    new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(folder / "a")
    StreamAdapter(tiny_config(), 48, {"0.mlp.up_proj": (48, 64)}).save_pretrained(folder / "other")
    new_adapter(base.model, tiny_config(draft_vocab_size=2), draft_ids=torch.tensor([-3, 5])).save_pretrained(folder / "drafts")
    for name in ("cut", "typed"):
        shutil.copytree(folder / "a", folder / name)
    (folder / "cut" / "adapter.safetensors").write_bytes((folder / "a" / "adapter.safetensors").read_bytes()[:500])
    written = json.loads((folder / "typed" / "adapter_config.json").read_text())
    written["streaming"]["tree_nodes"] = "20"
    (folder / "typed" / "adapter_config.json").write_text(json.dumps(written))
    (folder / "p.jsonl").write_text('{"prompt": "w1 w2"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "w1 " * 600}) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text('{"prompt": "  "}\n')
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    shutil.copytree(folder / "m", folder / "torn")
    (folder / "torn" / "model.safetensors").write_bytes((folder / "m" / "model.safetensors").read_bytes()[:1000])
    shutil.copytree(folder / "m", folder / "words")
    (folder / "words" / "tokenizer.json").write_text('{"model": 3}')
    shutil.copytree(folder / "m", folder / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(folder / "m")
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(folder / "foreign")
    (folder / "beyond.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "beyond w1"}\n')
    (folder / "file").write_text("a file where a folder should be")
    (folder / "broken-answers").mkdir()
    (folder / "broken-answers" / "distill.json").write_text("{")
    return folder


MODEL, FITS, ASK, FILE = "--model m", "--adapter a", "--prompt w1 --max-new-tokens 4", "--prompts p.jsonl --max-new-tokens 4"
COMMANDS = [  # what is typed, and what must be in the one line
    ("generat --prompt x", "did you mean 'generate'?"),
    ("", "required"),
    (f"compare {MODEL} {FITS} {ASK} --max-new-token 4x", "--max-new-token"),
    (f"compare {MODEL} {FITS} {ASK} --adapater a", "did you mean '--adapter'?"),
    (f"bench {MODEL} {FITS} {FILE} --tree-node=4 --sed 3", "did you mean '--seed'?"),
    (f"compare {MODEL} {FITS} {ASK} --dtype float23", "did you mean 'float32'?"),
    (f"compare {MODEL} {FITS} {ASK} --load-in 4bits", "did you mean '4bit'?"),
    (f"compare {MODEL} {FITS} {ASK} --exact bitwize", "did you mean 'bitwise'?"),
    (f"compare {MODEL} {FITS} {ASK} --schedule defered", "did you mean 'deferred'?"),
    (f"compare {MODEL} {FITS} {ASK} --device cuda:99", "device"),
    (f"compare {MODEL} {FITS} {ASK} --device gpu", "'gpu'"),
    (f"compare {MODEL} {FITS} {ASK} --temperature nan", "temperature must be a finite number, got nan"),
    (f"compare {MODEL} {FITS} {ASK} --temperature 0", "temperature must be above 0, got 0.0"),
    (f"compare {MODEL} {FITS} {ASK} --top-p 1.5", "top_p must be above 0 and at most 1, got 1.5"),
    (f"compare {MODEL} {FITS} {ASK} --seed 99999999999999999999", "seed must be at least 0 and below 2**63, got 99999999999999999999"),
    (f"compare {MODEL} {FITS} {ASK} --tree-nodes 0", "tree_nodes must be at least 1, got 0"),
    (f"compare {MODEL} {FITS} {ASK} --pruning-floor 2", "pruning_floor must be at least 0 and below 1, got 2.0"),
    (f"compare {MODEL} {FITS} --prompt w1 --max-new-tokens 0", "max_new_tokens must be at least 1, got 0"),
    (f"compare {MODEL} {FITS} --prompt w1 --max-new-tokens 9999", "context of 512"),
    (f"compare {MODEL} {FITS} {ASK} --json .", "--json must name a file, got '.'"),
    (f"compare {MODEL} {FITS} {ASK} --json file/report.json", "file/report.json"),
    (f"bench {MODEL} {FITS} {FILE} --json file/report.json", "file"),
    (f"generate {MODEL} {ASK} --adapter other", "another model"),
    (f"generate {MODEL} {ASK} --adapter drafts", "drafts token -3"),
    (f"generate {MODEL} {ASK} --adapter cut", "cut short"),
    (f"generate {MODEL} {ASK} --adapter typed", "tree_nodes must be a whole number, got '20'"),
    (f"generate {MODEL} {ASK} --adapter ./gone", "no adapter folder"),
    (f"generate --model torn {FITS} {ASK}", "cannot load 'torn'"),
    (f"generate --model words {FITS} {ASK}", "cannot load 'words'"),
    (f"generate --model ./gone {FITS} {ASK}", "no model folder"),
    (f"generate --model file {FITS} {ASK}", "cannot load 'file'"),
    (f"verify {MODEL} {FITS} --prompts empty.jsonl", "holds no prompts"),
    (f"verify {MODEL} {FITS} --prompts blank.jsonl", "must not be empty"),
    (f"verify {MODEL} {FITS} --prompts binary.jsonl", "not UTF-8"),
    (f"verify {MODEL} {FITS} --prompts long.jsonl", "context of 512"),
    (f"verify {MODEL} {FITS} --prompts gone.parquet", "no prompt file"),
    (f"verify {MODEL} {FITS} --prompts m/config.json", "holds no prompts"),
    (f"bench {MODEL} {FITS} --suite mt_bnch", "did you mean 'mt_bench'?"),
    (f"bench {MODEL} {FITS} {FILE} --sides stok accelerated", "did you mean 'stock'?"),
    (f"bench {MODEL} {FITS} {FILE} --limit -1", "limit must be at least 1, got -1"),
    (f"bench {MODEL} {FITS} {FILE} --beside -1", "beside must be at least 0, got -1"),
    (f"doctor {MODEL} --adapter gone/adapter/deep", "no adapter folder"),
    (f"doctor {MODEL} {FITS} --exact never", "exact must be one of"),
    (f"forecast {MODEL} --adapter file", "file"),
    (f"forecast {MODEL} {FITS} --plot .", "--plot must name a file"),
    (f"distill {MODEL} --prompts p.jsonl --out file", "file"),
    (f"distill {MODEL} --prompts p.jsonl --out broken-answers", "distill.json is broken"),
    (f"distill {MODEL} --prompts p.jsonl --out d --temperatures -1", "temperatures must be at least 0"),
    (f"distill {MODEL} --prompts p.jsonl --out d --temperatures inf", "temperatures must be a list of finite numbers"),
    (f"distill {MODEL} --prompts p.jsonl --out d --batch-size 0", "batch_size must be at least 1, got 0"),
    (f"distill {MODEL} --prompts p.jsonl --out d --batch-size 999999999", "batch_size must be at most"),
    (f"distill {MODEL} --prompts p.jsonl --out d --max-new-tokens 512", "below the model's context of 512, got 512"),
    (f"train {MODEL} --data broken-answers --out t", "distill.json is broken"),
    (f"train {MODEL} --data gone --out t --steps 0", "steps must be at least 1, got 0"),
    *[(f"{command} --model foreign --adapter random {given}", "the tokenizer is not this model's: tokens must be below 96, got 96")
      for command, given in (("compare", "--prompt beyond"), ("generate", "--prompt beyond"), ("bench", "--prompts beyond.jsonl"), ("verify", "--prompts beyond.jsonl"))],
    (f"train {MODEL} --data gone --out t --learning-rate nan", "learning_rate must be a finite number, got nan"),
    (f"train {MODEL} --data gone --out t --share 0", "data_fraction must be above 0 and at most 1, got 0.0"),
    (f"train {MODEL} --data gone --out t --mixed-precision fp61", "did you mean 'fp16'?"),
    (f"train {MODEL} --data gone --out t --schedule parallell", "did you mean 'parallel'?"),
    (f"train {MODEL} --data gone --out t --begin-from gone/", "no adapter"),
    (f"ablate {MODEL} --data gone --out t --only papr", "did you mean 'paper'?"),
    ("push --adapter gone/deep/er --repo me/it", "no adapter folder"),
    ("push --adapter a --repo not-a-hub/id/at/all", "the hub did not take"),
]


@pytest.mark.parametrize(("typed", "word"), COMMANDS, ids=[typed or "nothing" for typed, _ in COMMANDS])
def test_a_command_says_in_one_line_what_is_wrong(
    typed: str, word: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the command line prints them
        try:
            code = main(typed.split())
        except SystemExit as stopped:  # argparse's way
            code = int(stopped.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.strip().splitlines() if "warning" not in line]
    assert len(lines) == 1, captured.err
    assert word in lines[0]
    assert lines[0].startswith("lossless")
    assert captured.out == ""


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "model": (lambda fast: accelerate(torch.nn.Linear(2, 2), AdapterConfig()), "model must be a loaded Hugging Face causal LM, got Linear"),  # type: ignore[arg-type]
    "no model": (lambda fast: accelerate(None, "a"), "causal LM, got NoneType"),  # type: ignore[arg-type]
    "adapter": (lambda fast: accelerate(fast.base, 3), "adapter must be a folder, a hub id, .* got int"),  # type: ignore[arg-type]
    "no adapter": (lambda fast: accelerate(fast.base, ""), "no adapter"),
    "level": (lambda fast: accelerate(fast.base, fast.adapter, exact="near tie"), "did you mean 'near-tie'"),
    "level of a kind": (lambda fast: accelerate(fast.base, fast.adapter, exact=3), "exact must be one of .* got 3"),  # type: ignore[arg-type]
    "override": (lambda fast: accelerate(fast.base, fast.adapter, tree_node=3), "did you mean 'tree_nodes'"),
    "override of a kind": (lambda fast: accelerate(fast.base, fast.adapter, tree_nodes=2.5), "tree_nodes must be a whole number, got 2.5"),
    "override of another kind": (lambda fast: accelerate(fast.base, fast.adapter, recall="no"), "recall must be True or False, got 'no'"),
    "more layers than there are": (lambda fast: accelerate(fast.base, AdapterConfig(num_msa_layers=99)), "99"),
    "field": (lambda fast: AdapterConfig.from_dict({"num_stream": 3}), "did you mean 'num_streams'"),
    "streams": (lambda fast: AdapterConfig(num_streams=True), "num_streams must be a whole number, got True"),
    "schedule": (lambda fast: DraftConfig(schedule=None), "schedule must be a text, got None"),  # type: ignore[arg-type]
    "steps": (lambda fast: TrainConfig(steps="9"), "steps must be a whole number, got '9'"),  # type: ignore[arg-type]
    "seed": (lambda fast: TrainConfig(seed=-1), "seed must be at least 0"),
    "temperatures": (lambda fast: DistillConfig(temperatures=0.5), "temperatures must be a list of finite numbers, got 0.5"),  # type: ignore[arg-type]
    "top_p": (lambda fast: Decoding(top_p=float("nan")), "top_p must be a finite number, got nan"),
    "base": (lambda fast: load_base("demo", "float16x"), "did you mean 'float16'"),
    "suite": (lambda fast: read_suite("humanevall"), "did you mean 'humaneval'"),
    "sides": (lambda fast: wanted(["accelerate"]), "did you mean 'accelerated'"),
    "prompt": (lambda fast: from_text(""), "must not be empty"),
    "record": (lambda fast: parse_record({"promt": "x"}, "1"), "it has promt"),
    "prompts": (lambda fast: read_prompts("./gone.jsonl"), "no prompt file at gone.jsonl"),
    "packing": (lambda fast: lossless.pack(torch.nn.ReLU()), "ReLU"),  # type: ignore[arg-type]
    "unpacking": (lambda fast: lossless.unpack(torch.nn.ReLU()), "ReLU"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_in_one_sentence_what_is_wrong(name: str, fast: AcceleratedModel) -> None:
    call, sentence = FUNCTIONS[name]
    with pytest.raises(UsageError, match=sentence) as caught:
        call(fast)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:not accelerated")
@pytest.mark.parametrize("shape", [(1, 2), (7, 2), (7, 5)], ids=str)
def test_a_mask_of_another_shape_than_the_prompt_is_the_base_s_to_refuse(shape: tuple[int, int], fast: AcceleratedModel) -> None:
    """Hugging Face leaves a mask of ones out on its way to a custom loop, of whatever shape it is."""
    given = {"attention_mask": torch.ones(shape, dtype=torch.long), "max_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    said = []
    for model in (fast.base, fast):
        with pytest.raises(RuntimeError) as caught:
            model.generate(ids, **given)
        said.append(str(caught.value))
    assert said[0] == said[1]




# a fifth of a second where huggingface_hub waits for minutes, and nothing between its tries
_HASTY = """
import time
from huggingface_hub import file_download
from lossless.adapter import hub
time.sleep, file_download._ETAG_RETRY_TIMEOUT, hub._PATIENCE = lambda seconds: None, 0.2, 0.2
"""


@pytest.mark.parametrize("hub", ["refuses", "is silent"])
def test_a_hub_that_does_not_answer_is_one_line(hub: str, place: Path) -> None:
    asked = ["generate --model m --adapter owner/name --prompt w1", "push --adapter a --repo owner/name", "generate --model owner/name --adapter a --prompt w1"]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if hub == "is silent":
            listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        changed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HOME": str(place / "hf"), "HF_TOKEN": "right"}
        found = run_all([(typed.split(), {}) for typed in asked], changed, _HASTY, cwd=place)
    for typed, done in zip(asked, found, strict=True):
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("lossless: ") and "warning" not in line]
        assert len(lines) == 1
        assert "owner/name" in lines[0]
        assert not typed.startswith("push") or "the hub did not take" in lines[0]


def test_a_place_where_another_process_is_at_work_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    (place / "busy").mkdir()
    for typed, where in (
        ("distill --model m --prompts p.jsonl --out busy", place / "busy"),
        ("bench --model m --adapter a --prompts p.jsonl --max-new-tokens 4 --json busy.json", place / "busy.json.journal"),
    ):
        with alone_with(where):  # a lock of another open file counts as another's
            assert main(typed.split()) == 2
        assert "another process is at work in" in capsys.readouterr().err


def test_two_models_of_one_shape_are_told_apart_by_their_fingerprint(place: Path) -> None:
    with pytest.warns(UserWarning, match="was trained for .* and this base differs in weights"):
        accelerate(build_tiny(seed=77), place / "a", exact="off")
