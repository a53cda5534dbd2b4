"""Suites: the right prompts from the right files, the same each time, and one clear line where there are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lossless.errors import UsageError
from lossless.evaluation import suites
from lossless.evaluation.suites import SUITES, Suite, read_suite


def write(path: Path, count: int, **record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({key: f"{value} {i}" if isinstance(value, str) else value for key, value in record.items()}) + "\n" for i in range(count))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_files_are_found_by_either_name_and_give_the_first_turn(tmp_path: Path) -> None:
    write(tmp_path / "mt_bench" / "question.jsonl", 2, turns=["ask", "ask again"], category="writing")
    write(tmp_path / "HumanEval.jsonl.gz", 3, prompt="def f():", task_id="HumanEval/")
    write(tmp_path / "gsm8k" / "test.jsonl", 2, question="how many", answer="9")
    asked = read_suite("mt_bench", tmp_path)
    assert [p.messages for p in asked] == [({"role": "user", "content": "ask"},)] * 2
    assert asked[0].category == "writing 0"
    assert [p.messages[0]["content"] for p in read_suite("humaneval", tmp_path)] == ["def f(): 0", "def f(): 1", "def f(): 2"]
    assert {p.category for name in ("humaneval", "gsm8k") for p in read_suite(name, tmp_path)} == {"humaneval", "gsm8k"}


def test_a_limit_is_spread_over_the_suite(tmp_path: Path) -> None:
    write(tmp_path / "spec_bench.jsonl", 10, turns=["x"], category="task")
    assert [p.category for p in read_suite("spec_bench", tmp_path, limit=3)] == ["task 0", "task 3", "task 6"]
    assert len(read_suite("spec_bench", tmp_path, limit=11)) == 10


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gsm8k_test.jsonl", 1, question="how many")
    monkeypatch.setenv(suites.FOLDER_VARIABLE, str(tmp_path))
    assert len(read_suite("gsm8k")) == 1
    with pytest.raises(UsageError, match=r"no gsm8k_test.jsonl or gsm8k/test.jsonl in .*other; get it from https://github.com/openai/grade-school"):
        read_suite("gsm8k", tmp_path / "other")


def test_what_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(suites.FOLDER_VARIABLE, raising=False)
    for name in (name for name, suite in SUITES.items() if suite.files):
        with pytest.raises(UsageError, match=rf"{name}.*--suites or \$LOSSLESS_SUITES; get it from https://github.com/.*as {SUITES[name].files[0]}"):
            read_suite(name)
    with pytest.raises(UsageError, match=r"one of mt_bench, .*got 'mmlu'"):
        read_suite("mmlu")
    with pytest.raises(UsageError, match="limit must be at least 1, got 0"):
        read_suite("mt_bench", tmp_path, limit=0)
    monkeypatch.setattr(suites, "_OWN_PROMPTS", tmp_path / "data" / "prompts.jsonl")
    with pytest.raises(UsageError, match=r"'long_prompts' is made of data/prompts.jsonl, which a checkout .*--prompts"):
        read_suite("long_prompts")


def test_long_answers_are_asked_for_and_given_room() -> None:
    prompts = read_suite("long_answers")
    assert SUITES["long_answers"].max_new_tokens == 1024
    assert len(prompts) == 45
    assert all(p.messages[-1]["content"].endswith("write at length.") for p in prompts)
    assert prompts == read_suite("long_answers")


def test_long_prompts_are_long_differ_in_front_and_end_with_their_question() -> None:
    prompts, own = read_suite("long_prompts"), {p.id: p for p in suites.read_prompts(suites._OWN_PROMPTS)}
    assert len(prompts) == 18
    assert prompts == read_suite("long_prompts")
    texts = [p.messages[-1]["content"] for p in prompts]
    assert len({text[:400] for text in texts}) == 18, "a shared prefix would let a cache answer"
    for prompt, text in zip(prompts, texts, strict=True):
        question = own[prompt.id].messages[-1]["content"]
        assert text.endswith(question)
        assert text.count(question) == 1
        assert 4800 <= len(text) - len(question) <= 6600, "some 1,500 tokens"


def test_a_suite_has_rules() -> None:
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1"):
        Suite(0)
    with pytest.raises(UsageError, match="where it is published"):
        Suite(128, ("some.jsonl",))
