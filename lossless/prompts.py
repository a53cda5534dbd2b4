"""Prompts: reading them from JSONL, and turning them into token ids with the model's own template.

Knows: the shapes of a line (`prompt`, `question`, `turns`, `messages`) and chat templates.
Does not know: models, adapters, generation.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One question: an id, a category ("" if it has none) and the chat messages up to the user's turn."""

    id: str
    messages: tuple[Message, ...]
    category: str = ""

    def __post_init__(self) -> None:
        if not self.messages or not all(str(m.get("content", "")).strip() for m in self.messages):
            raise UsageError(f"a prompt must not be empty (prompt {self.id!r})")


def from_text(text: str, id: str = "prompt") -> Prompt:
    """A prompt of one user turn."""
    return Prompt(id=id, messages=({"role": "user", "content": text},))


def parse_line(line: str, id: str, category: str = "") -> Prompt:
    """One JSONL line: `prompt` or `question` (string), `turns` (strings; the first is asked) or `messages`.

    Raises:
        UsageError: not JSON, none of these fields, or an empty prompt.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise UsageError(f"a line must hold a JSON object, got {type(record).__name__}")
    return Prompt(
        id=str(record.get("id", record.get("question_id", id))),
        messages=_messages(record),
        category=str(record.get("category", category)),
    )


def _messages(record: dict[str, Any]) -> tuple[Message, ...]:
    for field in ("prompt", "question"):
        if isinstance(record.get(field), str):
            return ({"role": "user", "content": record[field]},)
    turns = record.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return ({"role": "user", "content": turns[0]},)
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        return tuple({"role": m["role"], "content": m["content"]} for m in messages)
    raise UsageError("a line must hold 'prompt' or 'question' (strings), 'turns' (strings) or 'messages' (role and content)")


def read_prompts(paths: str | Path | Iterable[str | Path], limit: int | None = None) -> list[Prompt]:
    """Read the prompts of JSONL files (`.gz` too), at most `limit` of each; a line without a category gets the file's name.

    Raises:
        UsageError: no such file, no prompts in it, or a bad line (its number is named).
    """
    files = [paths] if isinstance(paths, (str, Path)) else paths
    return [prompt for path in files for prompt in _read_file(Path(path), limit)]


def _read_file(path: Path, limit: int | None) -> list[Prompt]:
    if not path.is_file():
        raise UsageError(f"no prompt file at {path}")
    prompts: list[Prompt] = []
    name = path.name.split(".")[0]
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(prompts) >= limit:
                break
            if line.strip():
                try:
                    prompts.append(parse_line(line, id=f"{name}-{number}", category=name))
                except UsageError as error:
                    raise UsageError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return prompts


def encode(tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    """Token ids of the conversation, opened at the assistant's turn.

    A tokenizer without a chat template gets the plain text of the last message.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_user_opening(tokenizer: Any) -> list[int]:
    """Token ids of an empty conversation opened at the user's turn: what follows is drawn as a prompt.

    Raises:
        UsageError: the tokenizer has no chat template, so it has no user turn to open.
    """
    if not tokenizer.chat_template:
        raise UsageError("prompts can be drawn from a model only if its tokenizer has a chat template")
    mark = "\u2603user turn\u2603"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return list(tokenizer(text[: text.index(mark)], add_special_tokens=False)["input_ids"])
