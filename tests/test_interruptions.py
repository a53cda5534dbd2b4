"""Killed at any time, started in several processes, or out of disk: what was done is kept, and whole."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lossless.adapter.weights import StreamAdapter
from lossless.cli.parser import main
from lossless.distillation.answers import Answers
from lossless.storage import read_jsonl

from .forked import Forked

DISTILL = ["--max-new-tokens", "24", "--batch-size", "4", "--temperatures", "0", "--answer-tokens", "100000"]
TRAIN = ["--steps", "90", "--num-msa-layers", "2", "--lora-rank", "4", "--transition-rank", "8", "--held-out", "4",
         "--answers-per-step", "4", "--eval-every", "45", "--checkpoint-every", "6"]  # fmt: skip
EVERY = 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"w{i % 80} w{i % 7 + 3}", "w5"]}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def answers(tiny_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted `distill` gives."""
    folder = tmp_path_factory.mktemp("answers")
    assert main(["distill", "--model", str(tiny_folder), "--prompts", str(prompts), *DISTILL, "--out", str(folder)]) == 0
    return folder


def kill_when(folder: Path, arguments: list[str], reached: Callable[[], bool]) -> bool:
    """Run a command and kill it once `reached`; whether it was still running then."""
    command = Forked(folder, main, arguments)
    deadline = time.monotonic() + 300
    while command.running and not reached():
        assert time.monotonic() < deadline, "the command hangs"
        time.sleep(0.002)
    running = command.kill()
    assert running or command.process.exitcode == 0, command.output()
    return running


def stored(folder: Path) -> dict[str, Any]:
    found = Answers.read(folder)
    return {found[i]["id"]: found[i] for i in range(len(found))}


def test_killed_distillation_loses_no_answer_that_was_written(
    tiny_folder: Path, prompts: Path, answers: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    logs = tmp_path_factory.mktemp("logs")
    command = ["distill", "--model", str(tiny_folder), "--prompts", str(prompts), *DISTILL, "--out", str(tmp_path)]
    rng, whole, kills = random.Random(), stored(answers), 0
    for _ in range(2):
        before = stored(tmp_path) if kills else {}
        goal = len(before) + rng.randint(1, 40)
        kills += kill_when(logs, command, lambda goal=goal: len(stored(tmp_path)) >= goal)  # type: ignore[misc]
        after = stored(tmp_path)
        assert all(after[id] == whole[id] for id in after)
        assert before.keys() <= after.keys()
    assert kills > 0
    assert main(command) == 0
    assert stored(tmp_path) == whole


def test_killed_training_loses_at_most_one_checkpoint_interval(tiny_folder: Path, answers: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return ["train", "--model", str(tiny_folder), "--data", str(answers), "--out", str(out), *TRAIN]

    def steps() -> int:
        return len(read_jsonl(tmp_path / "cut" / "curve.jsonl"))

    assert main(command(tmp_path / "whole")) == 0
    rng, kills = random.Random(), 0
    for _ in range(2):
        goal = steps() + rng.randint(7, 30)
        kills += kill_when(tmp_path, command(tmp_path / "cut"), lambda goal=goal: steps() >= goal)  # type: ignore[misc]
        newest = max((tmp_path / "cut").glob("checkpoint-*/progress.json"))
        assert json.loads(newest.read_text())["progress"]["step"] > steps() - EVERY - 1
    assert kills > 0
    assert main(command(tmp_path / "cut")) == 0
    assert [entry["step"] for entry in read_jsonl(tmp_path / "cut" / "curve.jsonl")] == list(range(1, 91))
    whole, cut = (StreamAdapter.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=2e-3)


def noting(out: str, arguments: list[str]) -> int:
    """The command; of an adapter that has learnt, each process notes what it is like before the best one is read back."""
    read = StreamAdapter.load_state_dict

    def note(self: StreamAdapter, *given: Any, **how: Any) -> Any:
        if not self.transition.out.is_meta and self.transition.out.any():
            Path(out + os.environ["RANK"]).write_text(self.digest())
        return read(self, *given, **how)

    StreamAdapter.load_state_dict = note  # type: ignore[method-assign]
    return main(arguments)


def test_two_processes_share_the_work(tiny_folder: Path, prompts: Path, answers: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        """In two processes, as torchrun starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started = [
            Forked(tmp_path, noting, str(tmp_path / "adapter-"), list(arguments), changed=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
        ]
        ended = [process.finish() for process in started]
        assert [code for code, _ in ended] == [0, 0], ended

    model = ["--model", str(tiny_folder)]
    run("distill", *model, "--prompts", str(prompts), *DISTILL, "--out", str(tmp_path / "answers"))
    assert {path.name[:11] for path in (tmp_path / "answers").glob("*.arrow")} == {"answers-000", "answers-001"}
    assert stored(tmp_path / "answers") == stored(answers)
    run("train", *model, "--data", str(answers), "--out", str(tmp_path / "out"), *TRAIN, "--steps", "12", "--eval-every", "6")
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["processes"] == 2
    assert [entry["step"] for entry in read_jsonl(tmp_path / "out" / "curve.jsonl")] == list(range(1, 13))
    assert all(tensor.isfinite().all() for tensor in StreamAdapter.from_pretrained(tmp_path / "out").state_dict().values())
    first, second = ((tmp_path / f"adapter-{rank}").read_text() for rank in "01")
    assert first == second  # they saw different answers, and learnt the same


def test_a_full_disk_is_told_and_nothing_is_lost(
    tiny_folder: Path, prompts: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, usage = ["--model", str(tiny_folder)], namedtuple("usage", "total used free")
    train = ["train", *model, "--data", str(answers), "--out", str(tmp_path / "out"), *TRAIN]
    real, asked = shutil.disk_usage, []

    def filling(folder: Any) -> Any:
        asked.append(folder)
        return usage(10, 10, 0) if len(asked) == 3 else real(folder)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    assert main(train) == 2
    said = capsys.readouterr().err
    assert "the disk of" in said
    assert "is full" in said
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-000012"]
    assert main(train) == 0

    from lossless.distillation.answers import AnswerWriter

    write, written = AnswerWriter.write, []

    def full(self: AnswerWriter, answer: dict[str, Any]) -> None:
        written.append(answer["id"])
        if len(written) == 20:
            self._sink.write(b"\xff\xff")  # as far as there was room
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, answer)

    monkeypatch.setattr(AnswerWriter, "write", full)
    distill = ["distill", *model, "--prompts", str(prompts), *DISTILL, "--out", str(tmp_path / "answers")]
    assert main(distill) == 2
    assert "the disk is full; what was whole is kept" in capsys.readouterr().err
    assert len(stored(tmp_path / "answers")) == 19
    monkeypatch.setattr(AnswerWriter, "write", write)
    assert main(distill) == 0
    assert stored(tmp_path / "answers") == stored(answers)
