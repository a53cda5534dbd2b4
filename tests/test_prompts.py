"""Prompt files: the three shapes, the bad lines, and the project's own set."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from lossless.errors import UsageError
from lossless.prompts import encode, encode_user_opening, from_text, read_prompts

OWN = Path(__file__).parent.parent / "data" / "prompts.jsonl"


class Template:
    """A tokenizer of characters with a chat template."""

    chat_template = "yes"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool = True, add_generation_prompt: bool = False, **_: object):  # type: ignore[no-untyped-def]
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + ("<assistant>" if add_generation_prompt else "")
        return self(text) if tokenize else text


def test_three_shapes_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "one", "category": "a"},
        {"turns": ["two", "later"]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    found = read_prompts(path)
    assert [p.messages[-1]["content"] for p in found] == ["one", "two", "z"]
    assert found[0].category == "a"
    assert len(found[2].messages) == 3
    assert len(read_prompts(path, limit=2)) == 2
    assert len({p.id for p in found}) == 3


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
        ('{"prompt": "fine"}\n{"prompt": oops}\n', "line 2: not JSON"),
        ('{"prompt": "fine"}\n[1]\n', "line 2: a line must hold a JSON object"),
        ('{"text": "?"}\n', "line 1: a line must hold 'prompt'"),
        ('{"prompt": "  "}\n', "line 1: a prompt must not be empty"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: a line must hold 'prompt'"),
        ("\n\n", "holds no prompts"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=rule):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no prompt file at .*gone\.jsonl"):
        read_prompts(tmp_path / "gone.jsonl")


def test_templates_are_opened_where_they_should_be() -> None:
    tokenizer = Template()
    assert "".join(map(chr, encode(tokenizer, from_text("hi").messages))) == "<user>hi</><assistant>"
    assert "".join(map(chr, encode_user_opening(tokenizer))) == "<user>"
    tokenizer.chat_template = None  # type: ignore[assignment]
    assert "".join(map(chr, encode(tokenizer, from_text("hi").messages))) == "hi"
    with pytest.raises(UsageError, match="chat template"):
        encode_user_opening(tokenizer)


def test_the_project_s_own_prompts_are_what_their_readme_says() -> None:
    prompts = read_prompts(OWN)
    counts = Counter(p.category for p in prompts)
    assert len(prompts) >= 100
    assert len(counts) == 13
    assert min(counts.values()) >= 8
    assert len({p.id for p in prompts}) == len(prompts)
    assert len({p.messages[-1]["content"] for p in prompts}) == len(prompts)
    assert f"{OWN.stat().st_size:,} bytes" in (OWN.parent / "README.md").read_text(encoding="utf-8")
