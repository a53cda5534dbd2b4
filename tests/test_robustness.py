"""Rough days, the short versions; and the table of the long ones is what was found."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest

from lossless.distillation.answers import AnswerWriter, mend
from lossless.errors import UsageError

from .robustness import calls, faults, files, fuzz, long, soak, table
from .robustness.report import Tally


def test_random_calls_give_what_the_base_gives(tmp_path: Path) -> None:
    assert fuzz.main(["--calls", "30", "--seed", "3", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["done"], found["failures"]) == (30, [])
    assert found["counts"]["calls: exact"] > 5


def test_a_case_is_made_of_its_seed_and_number_alone() -> None:
    assert str(calls.make(0, 7)) == str(calls.make(0, 7)) != str(calls.make(1, 7))
    assert calls.make(0, 7).ids.equal(calls.make(0, 7).ids)


def test_broken_files_are_one_sentence_each_and_nothing_is_lost(tmp_path: Path) -> None:
    arguments = ["--calls", "0", "--files", "80", "--seed", "5", "--json", str(tmp_path / "out.json")]
    assert fuzz.main(arguments) == 0
    assert fuzz.main(arguments) == 0  # nothing is left to do
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["done"], found["failures"]) == (80, [])
    assert min(found["counts"].values()) > 10


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Accelerate loads the state of what is registered with it as any pickle: nothing is."""
    shelf = files.Shelf(tmp_path)
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"):
        folder = tmp_path / f"with {name}"
        shutil.copytree(shelf.kinds["checkpoint"].whole, folder)
        (folder / "checkpoint-000002" / name).write_bytes(pickle.dumps(files.Trap(shelf.trap), protocol=2))
        with contextlib.suppress(UsageError), contextlib.redirect_stderr(io.StringIO()):
            shelf.kinds["checkpoint"].read(folder)
        assert not shelf.trap.exists(), name


def test_a_shard_that_is_damaged_and_not_torn_is_told_and_kept(tmp_path: Path) -> None:
    answer = {"id": "0", "category": "", "turn": 0, "temperature": 0.0, "prompt_ids": [4, 5], "answer_ids": [6, 7, 8]}
    with AnswerWriter(tmp_path, 0, {}) as writer:
        for number in range(9):
            writer.write(answer | {"id": str(number)})
    [path] = tmp_path.glob("*.arrow")
    whole = path.read_bytes()
    damaged = whole[: len(whole) // 2] + bytes(200) + whole[len(whole) // 2 + 200 :]
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"is damaged behind its first \d+ answers"):
        mend(tmp_path)
    assert path.read_bytes() == damaged


def test_a_shard_whose_fields_have_names_that_are_no_text_is_told_and_kept(tmp_path: Path) -> None:
    answer = {"id": "0", "category": "", "turn": 0, "temperature": 0.0, "prompt_ids": [4, 5], "answer_ids": [6, 7, 8]}
    with AnswerWriter(tmp_path, 0, {}) as writer:
        writer.write(answer)
    [path] = tmp_path.glob("*.arrow")
    damaged = path.read_bytes().replace(b"category", b"categor\xe9", 1)
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"is damaged behind its first 0 answers"):
        mend(tmp_path)
    assert path.read_bytes() == damaged


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    Tally("fuzz", {"seed": 1}, tmp_path / "out.json").close()
    with pytest.raises(UsageError, match="is of another run"):
        Tally("fuzz", {"seed": 2}, tmp_path / "out.json")


def test_threads_that_take_turns_get_the_lone_answers(tmp_path: Path) -> None:
    assert soak.main(["--seconds", "3", "--threads", "4", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["done"] > 0


def test_long_texts_are_exact() -> None:
    assert long.main(["--answer", "160", "--context", "320"]) == 0


def test_a_fault_leaves_everything_whole_or_absent(tmp_path: Path) -> None:
    """Kills, a second process, a full disk, a wrong clock."""
    assert faults.main(["--kills", "1", "--jobs", "distill", "fetch", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["failures"] == []
    if skipped := [kind for kind in found["counts"] if kind.startswith("skipped")]:
        pytest.skip("; ".join(skipped))


def test_the_table_of_the_long_runs_is_what_they_found() -> None:
    assert table.current() == table.made()
