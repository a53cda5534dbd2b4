"""Prompts: reading them from files and data sets, and turning them into token ids with the model's own template.

Knows: the shapes that a record may have, broken lines, and chat templates. Does not know: models, adapters, generation.

    {"prompt" | "question" | "query" | "text": ...}             plain
    {"instruction": ..., "input" | "context": ...}              alpaca, Dolly
    {"turns": [...]}                                            MT-bench: what the user says, one turn after the other
    {"messages": [{"role": ..., "content": ...}, ...]}          chat
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT
"""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tqdm.auto import tqdm

from ..errors import UsageError

Message = dict[str, str]

_PLAIN = ("prompt", "question", "query", "text")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # ShareGPT's names
_SAID = 300  # characters of somebody else's error
_NAMED = 3  # broken lines that are named; the rest are counted


@dataclass(frozen=True)
class Prompt:
    """One question: an id, a category ("" if it has none) and the chat messages up to the user's turn.

    `later` holds what the user says in the turns after this one.
    """

    id: str
    messages: tuple[Message, ...]
    category: str = ""
    later: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or not all(m["content"].strip() for m in self.messages if m["role"] != "system"):
            raise UsageError(f"a prompt must not be empty (prompt {self.id!r})")

    def from_the_start(self) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """The messages of the first turn, and what the user says in all later ones: nobody else's answers."""
        first = next(i for i, m in enumerate(self.messages) if m["role"] == "user")
        said = tuple(m["content"] for m in self.messages[first + 1 :] if m["role"] == "user")
        return self.messages[: first + 1], said + self.later


def from_text(text: str, id: str = "prompt") -> Prompt:
    """A prompt of one user turn."""
    return Prompt(id=id, messages=(_said(text),))


def _said(text: str, role: str = "user") -> Message:
    return {"role": role, "content": text}


def parse_record(record: Any, id: str, category: str = "") -> Prompt:
    """One record of a file or data set.

    Raises:
        UsageError: none of the shapes above, or an empty prompt.
    """
    if not isinstance(record, dict):
        raise UsageError(f"a line must hold a JSON object, got {type(record).__name__}")
    messages, later = _messages(record)
    named = [record[field] for field in ("id", "question_id") if record.get(field) not in (None, "")]
    return Prompt(str((named or [id])[0]), messages, str(record.get("category") or record.get("source") or category), later)


def _messages(record: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if isinstance(record.get("instruction"), str):
        extra = record.get("input") or record.get("context")
        return (_said(f"{record['instruction']}\n\n{extra}" if extra else record["instruction"]),), ()
    turns = record.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return (_said(turns[0]),), tuple(turns[1:])
    for field, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        told = record.get(field)
        if isinstance(told, list) and all(isinstance(m, dict) and isinstance(m.get(content), str) for m in told):
            messages = [_said(m[content], _ROLES.get(m.get(role, ""), m.get(role, ""))) for m in told]
            while messages and messages[-1]["role"] != "user":  # the last answer is what is to be found
                messages.pop()
            if messages:
                return tuple(messages), ()
    for field in _PLAIN:
        if isinstance(record.get(field), str):
            return (_said(record[field]),), ()
    raise UsageError(
        f"a record must hold a text ({', '.join(_PLAIN)}), 'instruction', 'turns', 'messages' or 'conversations' with a "
        f"user's turn; it has {', '.join(map(str, record)) or 'nothing'}"
    )


def read_prompts(sources: str | Path | Iterable[str | Path], limit: int | None = None) -> list[Prompt]:
    """Read the prompts of files and data sets, at most `limit` of each; a record without a category or source gets its file's name.

    A source is a JSONL file (`.gz` too), another file (JSON, CSV, Parquet, Arrow, text) or folder for `datasets`, or a data set's hub id
    (`owner/name:split` or `owner/name/configuration:split`; the split is `train` if none is named). Broken records are skipped, with one warning that counts them.

    Raises:
        UsageError: no such source, or no prompts in it.
    """
    several = [sources] if isinstance(sources, (str, Path)) else sources
    return [prompt for source in several for prompt in _read(str(source), limit)]


def _read(source: str, limit: int | None) -> list[Prompt]:
    prompts: list[Prompt] = []
    broken: list[str] = []
    taken: set[str] = set()
    name = Path(source).name.split(".")[0].split(":")[0]
    for where, record in _records(source):
        if limit is not None and len(prompts) >= limit:
            break
        try:
            if isinstance(record, Exception):
                raise UsageError(_why_broken(record))
            number = where.split()[-1]
            prompt = parse_record(record, id=f"{name}-{number}", category=name)
            if prompt.id in taken:  # an id that tells nothing apart
                prompt = replace(prompt, id=f"{prompt.id}-{number}")
            taken.add(prompt.id)
            prompts.append(prompt)
        except UsageError as error:
            broken.append(f"{where}: {error}")
    if not prompts:
        raise UsageError(f"{source} holds no prompts{f' ({some(broken)})' if broken else ''}")
    if broken:
        warnings.warn(f"{source}: {len(broken)} broken of {len(broken) + len(prompts)} records were skipped ({some(broken)})", stacklevel=3)
    return prompts


def some(reasons: list[str]) -> str:
    """The first of them, and how many more there are."""
    return "; ".join(reasons[:_NAMED]) + (f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else "")


def _why_broken(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1})"
    return f"not JSON ({error})" if isinstance(error, ValueError | RecursionError) else f"nothing can be read from here on ({error})"


def _records(source: str) -> Iterator[tuple[str, Any]]:
    """Each record with the words for its place; what cannot be read is given as the error."""
    path = Path(source).expanduser()
    if path.is_file() and {".jsonl", ".gz"} & set(path.suffixes[-1:]):
        yield from _lines(path)
    elif path.is_file() and path.suffix == ".json":
        yield from _json(path)
    else:
        for number, record in enumerate(_dataset(source, path), start=1):
            yield f"record {number}", record


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or, under that name too, one a line. (The reader of Arrow, which `datasets` takes for it, crashes
    on some broken files.)"""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        yield from _lines(path)
        return
    for number, record in enumerate(found if isinstance(found, list) else [found], start=1):
        yield f"record {number}", record


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield f"line {number}", error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # cut short, or not packed at all
            yield f"line {number + 1}", error


def _dataset(source: str, path: Path) -> Iterator[Any]:
    """Whatever `datasets` makes of a file, a folder or a hub id; from the hub no more than is read."""
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".gz", ".csv", ".parquet", ".arrow") or source.startswith((".", "/", "~"))):
        raise UsageError(f"no prompt file at {path}")
    try:
        yield from _loaded(source, path)
    except UsageError:
        raise
    except (MemoryError, GeneratorExit):
        raise
    except Exception as error:  # of a broken file, or a hub that does not answer, the readers say whatever they stumbled over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"no prompts at {source}: neither a file here nor a data set that can be read ({reason[:_SAID]})") from error


def _loaded(source: str, path: Path) -> Iterable[Any]:
    import datasets

    kinds = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
    name, _, split = source.partition(":")
    if path.is_file():
        if path.suffix not in kinds:
            raise UsageError(f"prompts are read from .jsonl, .jsonl.gz, .json, {', '.join(kinds)}, got {path}")
        return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        if not any(path.glob("**/dataset_info.json")):
            return datasets.load_dataset(str(path), split=split or "train")
        found = datasets.load_from_disk(str(path))
        return itertools.chain(*found.values()) if isinstance(found, dict) else found
    owner, _, rest = name.partition("/")
    whole, _, configuration = rest.partition("/")
    found = datasets.load_dataset(f"{owner}/{whole}" if rest else owner, configuration or None, split=split or "train", streaming=True)
    return tqdm(found, desc=source, unit="record", disable=not sys.stderr.isatty())


def encode(tokenizer: Any, messages: Iterable[Message]) -> list[int]:
    """Token ids of the conversation, opened at the assistant's turn.

    A tokenizer without a chat template gets the plain text of the messages, one a line.

    Raises:
        UsageError: the template refuses the conversation (a system message, for example).
    """
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise UsageError(f"the model's chat template refuses this conversation: {error}") from error
    return list(encoded["input_ids"])


def encode_user_opening(tokenizer: Any) -> tuple[list[int], str]:
    """Token ids of an empty conversation opened at the user's turn: what follows is drawn as a prompt. And the text that closes it.

    Raises:
        UsageError: the tokenizer has no chat template, or one that does not open the user's turn with anything.
    """
    if not tokenizer.chat_template:
        raise UsageError("prompts can be drawn from a model only if its tokenizer has a chat template")
    mark = "\u2603user turn\u2603"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    except TemplateError as error:
        raise UsageError(f"prompts cannot be drawn from this model: its chat template refuses a user's turn alone ({error})") from error
    before, shown, closing = text.partition(mark)
    opening = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    if not opening and tokenizer.bos_token_id is not None:
        opening = [tokenizer.bos_token_id]
    if not shown or not opening:
        raise UsageError("prompts cannot be drawn from this model: its chat template does not open the user's turn with anything")
    return opening, closing.strip()
