"""Batched answers equal `generate`'s, and an interrupted job goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from jinja2 import TemplateError

from lossless.base.loading import Base
from lossless.distillation import distill as module
from lossless.distillation.answers import Answers, AnswerWriter, mend
from lossless.distillation.batching import Job, JobQueue, _Batch, continue_all
from lossless.distillation.config import DistillConfig
from lossless.distillation.distill import distill
from lossless.distillation.prompts import Prompt, encode, from_text
from lossless.errors import UsageError
from lossless.storage import append_jsonl, read_jsonl

from .conftest import VOCAB, build_tiny

EOS = 7


class Words:
    """A tokenizer of numbers."""

    chat_template = None
    eos_token_id = EOS

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) % VOCAB for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(id) for id in ids if not (skip_special_tokens and id == EOS))

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCAB)}


def numbers(count: int) -> list[Prompt]:
    return [from_text(" ".join(str(10 + (i * 7 + k) % 80) for k in range(1 + i % 9)), f"p{i}") for i in range(count)]


@pytest.fixture
def base() -> Base:
    model = build_tiny(seed=5)
    model.generation_config.eos_token_id = EOS
    return Base(model, Words(), "tiny")


def continued(model: Any, jobs: list[Job], **how: Any) -> list[tuple[Job, list[int]]]:
    with torch.inference_mode(), continue_all(model, JobQueue(jobs), **{"generator": torch.Generator()} | how) as answers:
        return list(answers)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 64])
def test_greedy_answers_are_generate_s_own(base: Base, batch_size: int) -> None:
    jobs = [Job(p.id, Words()(p.messages[0]["content"])["input_ids"], 0.0) for p in numbers(40)]
    found = {job.id: answer for job, answer in continued(base.model, jobs, eos_ids={EOS}, batch_size=batch_size, max_new_tokens=25)}
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
        found = continued(base.model, jobs, eos_ids=set(), batch_size=8, max_new_tokens=12, generator=torch.Generator().manual_seed(seed))
        return [answer for _, answer in sorted((int(job.id), answer) for job, answer in found)]

    assert answers(2.0, 1) == answers(2.0, 1)
    assert answers(2.0, 1) != answers(2.0, 2)
    assert answers(2.0, 1) != answers(0.0, 1)


def test_hot_answers_follow_the_base_s_distribution(base: Base) -> None:
    """At its temperature, not at another."""
    logits, count = torch.tensor([1.0, 0.0, -0.5, 2.0, -torch.inf]), 4000
    for temperature in (0.6, 1.5):
        batch = _Batch(base.model, count, torch.Generator().manual_seed(0))
        for slot in batch.slots:
            slot.job = Job("x", [1], temperature)
        batch._append(list(range(count)), logits.expand(count, -1))
        drawn = torch.bincount(torch.tensor([slot.answer[0] for slot in batch.slots]), minlength=5) / count
        torch.testing.assert_close(drawn, torch.softmax(logits / temperature, -1), rtol=0, atol=4 * (0.25 / count) ** 0.5)


def by_id(folder: Path) -> dict[str, dict[str, Any]]:
    answers = Answers.read(folder)
    found = {answers[i]["id"]: answers[i] for i in range(len(answers))}
    assert len(found) == len(answers)  # none twice
    return found


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_and_taken_up_again(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    config = DistillConfig(answer_tokens=10_000, max_new_tokens=12, batch_size=4, temperatures=(0.0,))
    prompts = numbers(30)
    distill(base, prompts, config, tmp_path / "whole")

    real, seen = AnswerWriter.write, []

    def breaking(self: AnswerWriter, answer: dict[str, Any]) -> None:
        real(self, answer)
        seen.append(answer["id"])
        if len(seen) == 11:
            shards.append((self._path, self._path.read_bytes()))  # type: ignore[union-attr]
            raise KeyboardInterrupt

    shards: list[Any] = []
    monkeypatch.setattr(AnswerWriter, "write", breaking)
    with pytest.raises(KeyboardInterrupt):
        distill(base, prompts, config, tmp_path / "cut")
    monkeypatch.setattr(AnswerWriter, "write", real)
    if torn:  # as a process leaves it that is killed in the middle of an answer
        shards[0][0].write_bytes(shards[0][1][:-7])
    assert len(Answers.read(tmp_path / "cut")) == 11 - torn
    summary = distill(base, prompts, config, tmp_path / "cut")
    assert by_id(tmp_path / "whole") == by_id(tmp_path / "cut")
    assert summary["answers"] == 30
    assert json.loads((tmp_path / "cut" / "distill.json").read_text())["complete"]


def test_a_conversation_goes_on_with_the_model_s_own_answers(base: Base, tmp_path: Path) -> None:
    talk = Prompt("talk", ({"role": "user", "content": "11 12"},), "chat", ("13", "14 15"))
    config = DistillConfig(answer_tokens=10_000, max_new_tokens=6, batch_size=4, temperatures=(0.0,), max_turns=3)
    distill(base, [talk, *numbers(3)], config, tmp_path)
    found = by_id(tmp_path)
    turns = [found[f"0/{turn}:talk"] for turn in range(3)]
    assert len(found) == 6
    told: list[int] = []
    for turn, said in zip(turns, ([11, 12], [13], [14, 15]), strict=True):
        told += said
        assert turn["prompt_ids"] == told
        ids = torch.tensor([told])
        plain = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert turn["answer_ids"] == plain[0, ids.shape[1] :].tolist()
        told += [id for id in turn["answer_ids"] if id != EOS]
    assert {turn["category"] for turn in turns} == {"chat"}
    # with the later turns lost, the same command finds its way back into the conversation
    kept = [i for i, id in enumerate(Answers.read(tmp_path).column("id")) if not id.startswith(("0/1", "0/2"))]
    rest = [Answers.read(tmp_path)[i] for i in kept]
    for shard in tmp_path.glob("*.arrow"):
        shard.unlink()
    with AnswerWriter(tmp_path, 0, {}) as writer:
        for answer in rest:
            writer.write(answer)
    distill(base, [talk, *numbers(3)], config, tmp_path)
    assert by_id(tmp_path) == found


def test_a_conversation_that_the_template_refuses_is_skipped(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(Words):
        chat_template = "no system message"

        def apply_chat_template(self, messages: Any, **_: Any) -> Any:
            if messages[0]["role"] == "system":
                raise TemplateError("System role not supported")
            return self(" ".join(m["content"] for m in messages))

    strict = Base(base.model, Strict(), "tiny")
    system = Prompt("s", ({"role": "system", "content": "1"}, {"role": "user", "content": "11"}))
    config = DistillConfig(max_new_tokens=5, batch_size=2)
    with pytest.warns(UserWarning, match=r"1 turns of conversations were skipped .0/0:s: the model's chat template refuses"):
        summary = distill(strict, [system, *numbers(3)], config, tmp_path)
    assert (summary["answers"], summary["turns_skipped"]) == (3, 1)
    with pytest.raises(UsageError, match=r"not one of 1 prompts could be answered .0/0:s: "):
        distill(strict, [system], config, tmp_path / "none")
    assert not json.loads((tmp_path / "none" / "distill.json").read_text())["complete"]
    with pytest.raises(UsageError, match="chat template refuses this conversation: System role"):
        encode(strict.tokenizer, system.messages)


def test_a_damaged_shard_is_not_mended(base: Base, tmp_path: Path) -> None:
    config = DistillConfig(answer_tokens=30, max_new_tokens=12, batch_size=4)
    distill(base, numbers(30), config, tmp_path)
    writer = AnswerWriter(tmp_path, 0, {"model": "m"})
    for i in range(2):
        writer.write({"id": f"{i}/0:x", "category": "", "turn": 0, "temperature": 0.0, "prompt_ids": [1], "answer_ids": [-65468]})
    writer._sink.close()  # killed
    assert writer._path is not None
    writer._path.write_bytes(damaged := writer._path.read_bytes()[:-3])
    with pytest.raises(UsageError, match=r"answer_ids in .* the answers are damaged"):
        distill(base, numbers(30), replace(config, answer_tokens=60), tmp_path)
    assert writer._path.read_bytes() == damaged


def test_shards_of_several_processes_are_mended_and_read_by_datasets(tmp_path: Path) -> None:
    def answer(i: int) -> dict[str, Any]:
        return {"id": str(i), "category": "", "turn": 0, "temperature": 0.0, "prompt_ids": [i], "answer_ids": [i] * (i % 3)}

    for process in (0, 1):
        with AnswerWriter(tmp_path, process, {"model": "m"}) as writer:
            for i in range(4):
                writer.write(answer(10 * process + i))
    writer = AnswerWriter(tmp_path, 1, {"model": "m"})
    for i in (14, 15):
        writer.write(answer(i))
    writer._sink.close()  # killed
    torn = tmp_path / "answers-001-00001.arrow"
    torn.write_bytes(torn.read_bytes()[:-3])
    (tmp_path / "answers-001-00002.arrow").write_bytes(b"\xff\xff")  # begun, with nothing in it yet
    mend(tmp_path)
    found = Answers.read(tmp_path)
    assert found.column("id") == ["0", "1", "2", "3", "10", "11", "12", "13", "14"]
    assert found.emitted().tolist() == [1, 2, 2, 10, 11, 11, 13, 14, 14]
    assert found.lengths("answer_ids") == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert found.select([8, 0]).column("id") == ["14", "0"]
    shards = sorted(map(str, tmp_path.glob("*.arrow")))
    assert len(shards) == 3
    loaded = datasets.load_dataset("arrow", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"] == found.column("id")
    (tmp_path / "answers-002-00000.arrow").write_bytes(foreign_shard())
    with pytest.raises(UsageError, match="is no shard of answers"):
        Answers.read(tmp_path)


def foreign_shard() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"x": [1]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_fewer_jobs_than_slots(base: Base, count: int) -> None:
    jobs = [Job(str(i), [10 + i], 0.0) for i in range(count)]
    found = continued(base.model, jobs, eos_ids=set(), batch_size=8, max_new_tokens=5)
    assert sorted(job.id for job, _ in found) == [str(i) for i in range(count)]


@pytest.mark.parametrize("what", ["answers", "drawn prompts"])
def test_who_breaks_off_leaves_no_hook(what: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the traceback is held, too."""
    head, asked = base.model.get_output_embeddings(), []

    def broken_off(*given: Any) -> Any:
        asked.append(len(head._forward_pre_hooks))
        raise KeyboardInterrupt

    if what == "answers":
        monkeypatch.setattr(module.AnswerWriter, "write", broken_off)
    else:
        monkeypatch.setattr(module, "encode_user_opening", lambda tokenizer: ([14], ""))
        monkeypatch.setattr(module, "_closed", broken_off)
    config = DistillConfig(batch_size=4, max_new_tokens=8, max_prompt_tokens=30, self_drawn=4 if what == "drawn prompts" else 0)
    with pytest.raises(KeyboardInterrupt) as held:
        distill(base, numbers(6), config, tmp_path)
    assert asked == [1]
    assert not head._forward_pre_hooks
    assert held.traceback


def test_a_finished_folder_is_left_as_it_is(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything drawn and answered already: the same command has nothing to do, and says so."""
    monkeypatch.setattr(module, "encode_user_opening", lambda tokenizer: ([3], ""))
    monkeypatch.setattr(module, "_closed", lambda base, ids, closing: base.tokenizer.decode(ids))
    config = DistillConfig(answer_tokens=10_000, max_new_tokens=5, batch_size=4, self_drawn=3)
    first = distill(base, numbers(6), config, tmp_path)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert distill(base, numbers(6), config, tmp_path) == first  # the prompts ran out: there is nothing more to ask
    fewer = replace(config, answer_tokens=first["answer_tokens"])
    assert distill(base, numbers(6), fewer, tmp_path) == first
    assert "nothing is missing in" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert first["answers"] == 9


def test_prompts_are_drawn_by_all_processes_for_all(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        num_processes, is_main_process = 3, False

        def __init__(self, index: int) -> None:
            self.process_index = index

        def wait_for_everyone(self) -> None: ...

    monkeypatch.setattr(module, "encode_user_opening", lambda tokenizer: ([3], ""))
    monkeypatch.setattr(module, "_closed", lambda base, ids, closing: base.tokenizer.decode(ids))
    config, found = DistillConfig(self_drawn=7, batch_size=2), []
    for index in range(3):
        monkeypatch.setattr(module, "processes", lambda index=index: State(index))
        found.append([prompt.id for prompt in module._draw_prompts(base, config, tmp_path)])
    assert found[-1] == [f"drawn-{i}" for i in range(7)]
    assert [len(read_jsonl(path)) for path in sorted(tmp_path.iterdir())] == [3, 2, 2]


def test_a_drawn_prompt_ends_where_the_template_closes_the_turn(base: Base) -> None:
    """By the token that ends an answer, or by the template's own words; what comes behind is an answer, not a prompt."""
    assert module._closed(base, [11, 12, EOS], "90 91") == "11 12"
    assert module._closed(base, [11, 12, 90, 91, 13], "90 91") == "11 12"
    assert module._closed(base, [11, 12, 13], "90 91") == ""
    assert module._closed(base, [11, 12, 13], "") == ""


def test_prompts_without_an_end_are_left_out(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "encode_user_opening", lambda tokenizer: ([3], ""))
    monkeypatch.setattr(module, "_closed", lambda base, ids, closing: "14 15" if ids[0] % 2 else "")
    drawn = module._draw_prompts(base, DistillConfig(self_drawn=30, batch_size=8), tmp_path)
    assert 0 < len(drawn) < 30
    assert f"{30 - len(drawn)} of 30 drawn prompts had no end" in capsys.readouterr().out


def test_a_folder_keeps_to_its_precision_and_says_so_in_its_shards(base: Base, tmp_path: Path) -> None:
    config = DistillConfig(answer_tokens=40, max_new_tokens=5, batch_size=4)
    distill(base, numbers(6), config, tmp_path, ["asked.jsonl"])
    with pa.ipc.open_stream(next(tmp_path.glob("*.arrow")).read_bytes()) as shard:
        told = json.loads(shard.schema.metadata[b"provenance"])
    assert told["precision"] == "float32"
    assert (told["prompts"]["sources"], told["model"], told["config"]["batch_size"]) == (["asked.jsonl"], "tiny", 4)
    half = Base(build_tiny(seed=5).to(torch.bfloat16), base.tokenizer, "tiny")
    half.model.generation_config.eos_token_id = EOS
    with pytest.raises(UsageError, match=r"begun with other settings \(precision\)"):
        distill(half, numbers(6), config, tmp_path)


def test_a_batch_that_does_not_fit_is_told_beforehand(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = 3 * 2 * 2 * 8 * 4 * (384 + 5) / 2**30  # layers, keys and values, heads, width, bytes, tokens
    config = DistillConfig(answer_tokens=40, max_new_tokens=5, batch_size=64)
    monkeypatch.setattr(module, "free_memory", lambda device: 10.5 * each)
    with pytest.raises(UsageError, match="batch_size must be at most 10 here, got 64"):
        distill(base, numbers(6), config, tmp_path)
    monkeypatch.setattr(module, "free_memory", lambda device: 65 * each)
    distill(base, numbers(6), config, tmp_path)  # nothing was lost, and nothing is in the way
    assert f"up to {64 * each:.1f} GB of memory for keys and values" in capsys.readouterr().out


def test_rows_that_have_ended_are_replaced_at_once(base: Base) -> None:
    jobs = [Job(str(i), [10 + i % 80], 0.0) for i in range(64)]
    passes = []
    hook = base.model.register_forward_hook(lambda module, given, kwargs, output: passes.append(kwargs["input_ids"].shape), with_kwargs=True)
    answers = [answer for _, answer in continued(base.model, jobs, eos_ids={EOS, 8, 9, 10, 11}, batch_size=8, max_new_tokens=40)]
    hook.remove()
    steps = sum(shape[1] == 1 and shape[0] == 8 for shape in passes)
    together = [max(map(len, answers[i : i + 8])) for i in range(0, 64, 8)]
    assert min(map(len, answers)) < 10 < max(map(len, answers))
    assert steps < 1.1 * sum(map(len, answers)) / 8
    assert steps < 0.7 * sum(together)  # what a batch takes that waits for its longest


def test_temperatures_are_used_in_turn(base: Base, tmp_path: Path) -> None:
    distill(base, numbers(9), DistillConfig(answer_tokens=10_000, max_new_tokens=4, batch_size=4, temperatures=(0.0, 0.5, 0.9)), tmp_path)
    assert {id: found["temperature"] for id, found in by_id(tmp_path).items()} == {
        f"{i}/0:p{i}": pytest.approx((0.0, 0.5, 0.9)[i % 3]) for i in range(9)
    }


def test_it_stops_at_the_tokens_asked_for_and_skips_long_prompts(base: Base, tmp_path: Path) -> None:
    config = DistillConfig(answer_tokens=60, max_new_tokens=10, max_prompt_tokens=4, batch_size=2)
    with pytest.warns(UserWarning, match=r"turns of conversations were skipped .*: a prompt of \d tokens, at most 4 are taken"):
        summary = distill(base, numbers(60), config, tmp_path)
    assert 60 <= summary["answer_tokens"] < 60 + 10
    assert all(len(r["prompt_ids"]) <= 4 for r in by_id(tmp_path).values())


def test_nothing_goes_beyond_the_model_s_context(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.model.config, "max_position_embeddings", 16)
    talk = Prompt("talk", ({"role": "user", "content": "11 12"},), "chat", ("13", "14 15"))
    config = DistillConfig(max_new_tokens=6, batch_size=2, temperatures=(0.0,))
    with pytest.warns(UserWarning, match=r"0/\d:talk: a prompt of 1\d tokens, at most 10 are taken"):
        distill(base, [talk, *numbers(3)], config, tmp_path)
    assert max(len(r["prompt_ids"]) + len(r["answer_ids"]) for r in by_id(tmp_path).values()) <= 16
    with pytest.raises(UsageError, match="max_new_tokens must be below the model's context of 16, got 16"):
        distill(base, numbers(3), replace(config, max_new_tokens=16), tmp_path / "other")


def test_a_short_job_asks_prompts_of_all_sources_and_lengths(base: Base, tmp_path: Path) -> None:
    config = DistillConfig(answer_tokens=250, max_new_tokens=5, batch_size=4)
    distill(base, numbers(400), config, tmp_path)
    asked = [int(id.split("/")[0]) for id in by_id(tmp_path)]
    assert len(asked) < 80
    assert min(asked) < 50
    assert max(asked) > 350
    assert {len(r["prompt_ids"]) for r in by_id(tmp_path).values()} >= {1, 2, 8, 9}


def test_other_settings_or_prompts_in_a_begun_folder_are_refused(base: Base, tmp_path: Path) -> None:
    config = DistillConfig(answer_tokens=10, max_new_tokens=5, batch_size=2)
    distill(base, numbers(4), config, tmp_path, ["four.jsonl"])
    written = json.loads((tmp_path / "distill.json").read_text())
    assert (written["prompts"]["sources"], written["prompts"]["count"]) == (["four.jsonl"], 4)
    with pytest.raises(UsageError, match=r"begun with other settings \(max_new_tokens\)"):
        distill(base, numbers(4), replace(config, max_new_tokens=6), tmp_path)
    for others in (numbers(5)[1:], numbers(3), [*numbers(3), from_text("11", "p3")]):
        with pytest.raises(UsageError, match=r"begun with other settings \(prompts\)"):
            distill(base, others, config, tmp_path)
    assert distill(base, numbers(9), replace(config, answer_tokens=10_000), tmp_path)["answers"] == 9  # more may follow
    with pytest.raises(UsageError, match="no prompts"):
        distill(base, [], DistillConfig(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_answers_are_told_apart_by_what_they_say() -> None:
    def record(i: int, **change: Any) -> dict[str, Any]:
        return {"id": str(i), "category": "", "turn": 0, "temperature": 0.0, "prompt_ids": [i], "answer_ids": [i, i]} | change

    def digest(*records: dict[str, Any]) -> str:
        return Answers.of(list(records)).digest()

    first = digest(record(1), record(2))
    assert digest(record(2), record(1)) == first
    others = [record(2, answer_ids=[2, 3]), record(2, answer_ids=[2]), record(2, prompt_ids=[3]), record(2, temperature=1.0), record(3)]
    assert len({first, *(digest(record(1), other) for other in others)}) == 6


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
