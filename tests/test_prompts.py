"""Prompt files: the three shapes, the bad lines, and the project's own set."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
from jinja2 import TemplateError

from lossless.distillation.prompts import Prompt, encode, encode_user_opening, from_text, read_prompts
from lossless.errors import UsageError

OWN = Path(__file__).parent.parent / "data" / "prompts.jsonl"


class Template:
    """A tokenizer of characters with a chat template."""

    chat_template = "yes"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool = True, add_generation_prompt: bool = False, **_: object):  # type: ignore[no-untyped-def]
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + ("<assistant>" if add_generation_prompt else "")
        return self(text) if tokenize else text


def chat(*told: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, told, strict=False)]


@pytest.mark.parametrize(
    ("record", "asked", "later"),
    [
        ({"prompt": "one"}, chat("one"), []),
        ({"question": "one", "answer": "two"}, chat("one"), []),
        ({"text": "one"}, chat("one"), []),
        ({"instruction": "do", "input": "this", "output": "done"}, chat("do\n\nthis"), []),
        ({"instruction": "do", "context": "", "text": "do: done"}, chat("do"), []),
        ({"turns": ["one", "later"]}, chat("one"), ["later"]),
        ({"messages": chat("one", "two", "three")}, chat("one", "two", "three"), []),
        ({"messages": chat("one", "two"), "prompt": "one"}, chat("one"), []),
        ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}, {"from": "human", "value": "three"}]},
         chat("one", "two", "three"), []),
    ],
)  # fmt: skip
def test_shapes_of_a_record(tmp_path: Path, record: dict[str, object], asked: list[object], later: list[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(record) + "\n\n")
    [prompt] = read_prompts(path)
    assert list(prompt.messages) == asked
    assert list(prompt.later) == later
    assert (prompt.id, prompt.category) == ("p-1", "p")


def test_a_conversation_from_the_start_holds_nobody_s_answers() -> None:
    system = {"role": "system", "content": "Be brief."}
    prompt = Prompt("x", (system, *chat("one", "two", "three")), later=("four",))
    assert prompt.from_the_start() == ((system, *chat("one")), ("three", "four"))


def test_several_files_packed_ones_too_each_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"question": f"q{i}"}) + "\n" for i in range(3)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as lines:
        lines.write('{"prompt": "packed"}\n')
    found = read_prompts([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], limit=2)
    assert [(p.id, p.category, p.messages[0]["content"]) for p in found] == [
        ("a-1", "a", "q0"), ("a-2", "a", "q1"), ("b-1", "b", "packed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ('{"prompt": "fine"}\n{"prompt": oops}\n', "1 broken of 2 records were skipped .line 2: not JSON"),
        ('{"prompt": "fine"}\n[1]\n', "line 2: a line must hold a JSON object"),
        ('{"prompt": "fine"}\n{"title": "?"}\n', "line 2: a record must hold .* it has title"),
        ('{"prompt": "  "}\n{"prompt": "fine"}\n', "line 1: a prompt must not be empty"),
        ('{"messages": [{"role": "user"}]}\n{"prompt": "fine"}\n', "line 1: a record must hold"),
        ('{"prompt": "fine"}\n' + "[1]\n" * 9, "9 broken of 10 .*line 2: .*line 3: .*line 4: .*and 6 more"),
    ],
)
def test_broken_lines_are_skipped_counted_and_named(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.warns(UserWarning, match=rule):
        found = read_prompts(path)
    assert [p.messages[0]["content"] for p in found] == ["fine"]


def test_bytes_that_are_no_text_cost_their_line_only(tmp_path: Path) -> None:
    path, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    path.write_bytes(b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n{"prompt": "fine too"}\n')
    with pytest.warns(UserWarning, match="1 broken of 3 records were skipped .line 2: not UTF-8"):
        assert [p.messages[0]["content"] for p in read_prompts(path)] == ["fine", "fine too"]
    whole = gzip.compress("".join(json.dumps({"prompt": f"{i} {random.random()}"}) + "\n" for i in range(2000)).encode())
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"1 broken of \d+ records were skipped .line \d+: nothing can be read from here on .Compressed"):
        assert len(read_prompts(packed)) > 500
    packed.write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match=r"holds no prompts .line 1: nothing can be read from here on .Not a gzipped file"):
        read_prompts(packed)


@pytest.mark.parametrize("content", ["", "PAR1 and no more"], ids=["empty", "cut short"])
def test_files_that_datasets_cannot_read_are_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.parquet").write_text(content)
    with pytest.raises(UsageError, match=r"no prompts at .*p.parquet: neither a file here nor a data set that can be read"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("content", "count"), [('[{"prompt": "a"}, {"prompt": "b"}]', 2), ('{"prompt": "a"}', 1), ('{"prompt": "a"}\n{"prompt": "b"}\n', 2)]
)
def test_a_json_file_is_a_list_one_record_or_one_a_line(tmp_path: Path, content: str, count: int) -> None:
    (tmp_path / "p.json").write_text(content)
    assert [prompt.messages[0]["content"] for prompt in read_prompts(tmp_path / "p.json")] == ["a", "b"][:count]
    (tmp_path / "p.json").write_text(content[:-4])
    if count == 1:
        with pytest.raises(UsageError, match=r"p.json holds no prompts .line 1: not JSON"):
            read_prompts(tmp_path / "p.json")


@pytest.mark.parametrize(("content", "rule"), [("\n\n", "holds no prompts$"), ("oops\n", "holds no prompts .line 1: not JSON")])
def test_a_file_without_a_prompt_is_an_error(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=rule):
        read_prompts(path)


def test_what_datasets_reads(tmp_path: Path) -> None:
    rows = {"instruction": ["do", "undo"], "input": ["", "that"]}
    data = datasets.Dataset.from_dict(rows)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.to_csv(str(tmp_path / "b.csv"))
    data.save_to_disk(str(tmp_path / "c"))
    for name in ("a.parquet", "b.csv", "c"):
        found = read_prompts(tmp_path / name)
        assert [p.messages[0]["content"] for p in found] == ["do", "undo\n\nthat"]
        assert found[0].category == name[0]
    (tmp_path / "d.xml").write_text("<p/>")
    with pytest.raises(UsageError, match="prompts are read from"):
        read_prompts(tmp_path / "d.xml")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k/main:test", ("openai/gsm8k", "main", "test")),
        ("owner/set", ("owner/set", None, "train")),
        ("squad:validation", ("squad", None, "validation")),
    ],
)
def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]) -> None:
    def load(name: str, configuration: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (name, configuration, split, streaming) == (*asked, True)
        return [{"question": f"q{i}", "source": "trivia"} for i in range(9)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_prompts(source, 4)
    assert [prompt.messages[0]["content"] for prompt in found] == ["q0", "q1", "q2", "q3"]
    assert {prompt.category for prompt in found} == {"trivia"}


def test_a_data_set_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(UsageError, match="no prompts at nobody/nothing: neither a file here nor a data set"):
        read_prompts("nobody/nothing")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no prompt file at .*gone\.jsonl"):
        read_prompts(tmp_path / "gone.jsonl")


def test_templates_are_opened_where_they_should_be() -> None:
    tokenizer = Template()
    assert "".join(map(chr, encode(tokenizer, from_text("hi").messages))) == "<user>hi</><assistant>"
    assert "".join(map(chr, encode_user_opening(tokenizer)[0])) == "<user>"
    assert encode_user_opening(tokenizer)[1] == "</>"
    tokenizer.chat_template = None  # type: ignore[assignment]
    assert "".join(map(chr, encode(tokenizer, from_text("hi").messages))) == "hi"
    with pytest.raises(UsageError, match="chat template"):
        encode_user_opening(tokenizer)


def test_templates_that_open_with_nothing_or_refuse() -> None:
    tokenizer = Template()
    tokenizer.bos_token_id = 77  # type: ignore[attr-defined]
    tokenizer.apply_chat_template = lambda messages, **_: messages[0]["content"] + "</>"  # type: ignore[method-assign]
    assert encode_user_opening(tokenizer) == ([77], "</>")
    tokenizer.bos_token_id = None  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="does not open the user's turn with anything"):
        encode_user_opening(tokenizer)
    tokenizer.bos_token_id = 77  # type: ignore[attr-defined]
    tokenizer.apply_chat_template = lambda messages, **_: "<user>what was said is not shown</>"  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="does not open the user's turn with anything"):
        encode_user_opening(tokenizer)

    def refuse(messages: object, **_: object) -> str:
        raise TemplateError("a system message first")

    tokenizer.apply_chat_template = refuse  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"refuses a user's turn alone \(a system message first\)"):
        encode_user_opening(tokenizer)


def test_ids_that_tell_nothing_apart(tmp_path: Path) -> None:
    """Answers are held out by what their prompts are called: two prompts must not have one name."""
    path = tmp_path / "p.jsonl"
    records = [{"id": None, "prompt": "a"}, {"id": "", "question_id": 5, "prompt": "b"}, {"id": "x", "prompt": "c"}, {"id": "x", "prompt": "d"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [prompt.id for prompt in read_prompts(path)] == ["p-1", "5", "x", "x-4"]


def test_the_project_s_own_prompts_are_what_their_readme_says() -> None:
    prompts = read_prompts(OWN)
    counts = Counter(p.category for p in prompts)
    assert len(prompts) >= 100
    assert len(counts) == 13
    assert min(counts.values()) >= 8
    assert len({p.id for p in prompts}) == len(prompts)
    assert len({p.messages[-1]["content"] for p in prompts}) == len(prompts)
    assert f"{OWN.stat().st_size:,} bytes" in (OWN.parent / "README.md").read_text(encoding="utf-8")
