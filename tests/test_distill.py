"""Batched answers equal `generate`'s, and an interrupted job goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lossless.batch import Job, continue_all
from lossless.distill import DistillConfig, distill
from lossless.errors import UsageError
from lossless.models import Base
from lossless.prompts import Prompt, from_text
from lossless.storage import append_jsonl, read_jsonl

from .conftest import VOCAB, build_tiny

EOS = 7


class Words:
    """A tokenizer of numbers."""

    chat_template = None
    eos_token_id = EOS

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) % VOCAB for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCAB)}


def numbers(count: int) -> list[Prompt]:
    return [from_text(" ".join(str(10 + (i * 7 + k) % 80) for k in range(1 + i % 9)), f"p{i}") for i in range(count)]


@pytest.fixture
def base() -> Base:
    model = build_tiny(seed=5)
    model.generation_config.eos_token_id = EOS
    return Base(model, Words(), "tiny")


@pytest.mark.parametrize("batch_size", [1, 3, 16, 64])
def test_greedy_answers_are_generate_s_own(base: Base, batch_size: int) -> None:
    jobs = [Job(p.id, Words()(p.messages[0]["content"])["input_ids"], 0.0) for p in numbers(40)]
    with torch.inference_mode():
        found = {
            job.id: answer
            for job, answer in continue_all(
                base.model, iter(jobs), eos_ids={EOS}, batch_size=batch_size, max_new_tokens=25, generator=torch.Generator()
            )
        }
    assert len(found) == 40
    lengths = set()
    for job in jobs:
        ids = torch.tensor([job.prompt_ids])
        plain = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
        assert found[job.id] == plain[0, ids.shape[1] :].tolist()
        lengths.add(len(found[job.id]))
    assert len(lengths) > 1  # rows did finish at different times


def test_hot_answers_differ_from_greedy_and_repeat_with_the_seed(base: Base) -> None:
    def answers(temperature: float, seed: int) -> list[list[int]]:
        jobs = [Job(str(i), [10 + i], temperature) for i in range(8)]
        with torch.inference_mode():
            return [
                answer for _, answer in sorted(
                    ((int(job.id), answer) for job, answer in continue_all(
                        base.model, jobs, eos_ids=set(), batch_size=8, max_new_tokens=12,
                        generator=torch.Generator().manual_seed(seed))))
            ]  # fmt: skip

    assert answers(2.0, 1) == answers(2.0, 1)
    assert answers(2.0, 1) != answers(2.0, 2)
    assert answers(2.0, 1) != answers(0.0, 1)


def test_interrupted_and_taken_up_again(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DistillConfig(answer_tokens=10_000, max_new_tokens=12, batch_size=4, temperatures=(0.0,))
    prompts = numbers(30)
    distill(base, prompts, config, tmp_path / "whole")

    from lossless import distill as module

    real, seen = module.append_jsonl, []

    def breaking(path: Path):  # type: ignore[no-untyped-def]
        import contextlib

        @contextlib.contextmanager
        def opened():  # type: ignore[no-untyped-def]
            with real(path) as write:

                def counted(record: dict[str, Any]) -> None:
                    write(record)
                    seen.append(record["id"])
                    if len(seen) == 11:
                        raise KeyboardInterrupt

                yield counted

        return opened()

    monkeypatch.setattr(module, "append_jsonl", breaking)
    with pytest.raises(KeyboardInterrupt):
        distill(base, prompts, config, tmp_path / "cut")
    monkeypatch.setattr(module, "append_jsonl", real)
    with (tmp_path / "cut" / "answers.jsonl").open("a") as lines:
        lines.write('{"id": "torn')  # as a crash in the middle of a line would leave it
    summary = distill(base, prompts, config, tmp_path / "cut")

    whole, cut = (sorted(read_jsonl(tmp_path / f / "answers.jsonl"), key=lambda r: r["id"]) for f in ("whole", "cut"))
    assert whole == cut
    assert summary["answers"] == 30
    assert json.loads((tmp_path / "cut" / "distill.json").read_text())["complete"]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_fewer_jobs_than_slots(base: Base, count: int) -> None:
    jobs = [Job(str(i), [10 + i], 0.0) for i in range(count)]
    with torch.inference_mode():
        found = list(
            continue_all(base.model, jobs, eos_ids=set(), batch_size=8, max_new_tokens=5, generator=torch.Generator())
        )
    assert sorted(job.id for job, _ in found) == [str(i) for i in range(count)]


def test_a_finished_folder_is_left_as_it_is(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything drawn and answered already: the same command has nothing to do, and says so."""
    from lossless import distill as module

    monkeypatch.setattr(module, "encode_user_opening", lambda tokenizer: [3])
    config = DistillConfig(answer_tokens=10_000, max_new_tokens=5, batch_size=4, self_drawn=3)
    first = distill(base, numbers(6), config, tmp_path)
    content = (tmp_path / "answers.jsonl").read_bytes()
    again = distill(base, numbers(6), config, tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == content
    assert again["answers"] == first["answers"] == 9


def test_it_stops_at_the_tokens_asked_for_and_skips_long_prompts(base: Base, tmp_path: Path) -> None:
    config = DistillConfig(answer_tokens=60, max_new_tokens=10, max_prompt_tokens=4, batch_size=2)
    summary = distill(base, numbers(60), config, tmp_path)
    assert 60 <= summary["answer_tokens"] < 60 + 10
    assert all(len(r["prompt_ids"]) <= 4 for r in read_jsonl(tmp_path / "answers.jsonl"))


def test_other_settings_in_a_begun_folder_are_refused(base: Base, tmp_path: Path) -> None:
    distill(base, numbers(4), DistillConfig(answer_tokens=10, max_new_tokens=5, batch_size=2), tmp_path)
    with pytest.raises(UsageError, match=r"begun with other settings \(max_new_tokens\)"):
        distill(base, numbers(4), DistillConfig(answer_tokens=10, max_new_tokens=6, batch_size=2), tmp_path)
    with pytest.raises(UsageError, match="no prompts"):
        distill(base, [], DistillConfig(), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"answer_tokens": 0}, "answer_tokens must be at least 1, got 0"),
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (-1.0,)}, "temperatures must be at least 0"),
        ({"self_drawn": -1}, "self_drawn must be at least 0"),
    ],
)
def test_config_rules(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        DistillConfig(**change)


def test_appending_after_a_torn_line_loses_only_that_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with append_jsonl(path) as write:
        write({"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]
    assert read_jsonl(tmp_path / "none.jsonl") == []
