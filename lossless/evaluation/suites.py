"""Suites of prompts by name: public benchmarks from files of your own, and two that are made of the project's prompts.

Knows: which file is which benchmark's, where it is published, and how long its answers may be. Does not know: models,
tokenizers, or what the file's records look like (prompts.py). Of a talk the first turn is asked.

The files of public benchmarks are under licences of their own and are not part of this project.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..distillation.prompts import Message, Prompt, read_prompts
from ..errors import UsageError, require_at_least, require_one_of

FOLDER_VARIABLE = "LOSSLESS_SUITES"
_OWN_PROMPTS = Path(__file__).parents[2] / "data" / "prompts.jsonl"  # beside the package in a checkout
_BACKGROUND = 4800  # characters in front of a long prompt, which has some 1,500 tokens then
# prompts whose good answer is long: a tale, an article, a worked example
_LONG = ("writing", "roleplay", "coding", "qa", "reasoning")


@dataclass(frozen=True)
class Suite:
    """A named set of prompts.

    Attributes:
        max_new_tokens: how long an answer may be, unless the caller says otherwise.
        files: where it may lie in the folder of suites; the first name is the one that is asked for. Empty for a suite
            of the project's own prompts.
        published: where the file comes from.
        make: what becomes of the prompts that were read.
    """

    max_new_tokens: int
    files: tuple[str, ...] = ()
    published: str = ""
    make: Callable[[list[Prompt]], list[Prompt]] = list

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_new_tokens")
        if bool(self.files) != bool(self.published):
            raise UsageError(f"a suite of a file must say where it is published, got {self.files} and {self.published!r}")


def read_suite(name: str, folder: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a suite, or `limit` of them, spread evenly over it: files are often sorted by category.

    Args:
        name: one of `SUITES`.
        folder: where the files of public benchmarks lie; by default `$LOSSLESS_SUITES`.

    Raises:
        UsageError: no such suite or file, or a limit below 1.
    """
    require_one_of(SUITES, "suite", name)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    suite = SUITES[name]
    path = _find(name, suite, folder or os.environ.get(FOLDER_VARIABLE)) if suite.files else _own(name)
    nameless = path.name.split(".")[0]  # what a record without a category is given
    prompts = [replace(p, category=name) if p.category == nameless else p for p in suite.make(read_prompts(path))]
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def _find(name: str, suite: Suite, folder: str | Path | None) -> Path:
    """The suite's file in the folder."""
    mend = f"get it from {suite.published} and put it there as {suite.files[0]}"
    if folder is None:
        raise UsageError(f"suite {name!r} needs a folder with its file: name one with --suites or ${FOLDER_VARIABLE}; {mend}")
    for file in suite.files:
        if (path := Path(folder).expanduser() / file).is_file():
            return path
    raise UsageError(f"suite {name!r}: there is no {' or '.join(suite.files)} in {folder}; {mend}")


def _own(name: str) -> Path:
    """The project's prompts."""
    if not _OWN_PROMPTS.is_file():
        raise UsageError(
            f"suite {name!r} is made of data/prompts.jsonl, which a checkout of the project has and an installed package "
            f"has not ({_OWN_PROMPTS}): run from a checkout, or name a file with --prompts"
        )
    return _OWN_PROMPTS


def _long_answers(prompts: list[Prompt]) -> list[Prompt]:
    """Prompts of the categories that long texts answer, each asked not to be brief."""
    return [
        replace(p, messages=_with(p, f"{_asked(p)}\n\nTake all the room that you need: be thorough, and write at length."))
        for p in prompts
        if p.category in _LONG
    ]


def _long_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """Questions about a given text, with other texts in front of it: those of the prompts that follow in the file."""
    given = [p for p in prompts if p.category in ("summarization", "rag")]
    return [replace(p, messages=_with(p, _behind(_background(given, number), _asked(p)))) for number, p in enumerate(given)]


def _background(given: list[Prompt], number: int) -> list[str]:
    """Texts of the prompts after this one, round about, until there are enough characters."""
    texts: list[str] = []
    for other in (*given[number + 1 :], *given[:number]):
        if sum(map(len, texts)) >= _BACKGROUND:
            break
        texts.append(_asked(other).partition("\n\n")[2] or _asked(other))  # without the line that asks
    return texts


def _behind(texts: list[str], question: str) -> str:
    numbered = [f"Text {number}\n\n{text}" for number, text in enumerate(texts, start=1)]
    return "\n\n".join(["Read these texts. A question follows them.", *numbered, "The question:", question])


def _asked(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def _with(prompt: Prompt, content: str) -> tuple[Message, ...]:
    """The messages, with another user's turn at the end."""
    return (*prompt.messages[:-1], {"role": "user", "content": content})


SUITES = {
    "mt_bench": Suite(
        256,
        ("mt_bench.jsonl", "mt_bench/question.jsonl"),
        "https://github.com/lm-sys/FastChat (fastchat/llm_judge/data/mt_bench/question.jsonl)",
    ),
    "spec_bench": Suite(
        256,
        ("spec_bench.jsonl", "spec_bench/question.jsonl"),
        "https://github.com/hemingkx/Spec-Bench (data/spec_bench/question.jsonl)",
    ),
    "humaneval": Suite(256, ("HumanEval.jsonl.gz", "HumanEval.jsonl"), "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)"),
    "gsm8k": Suite(
        256,
        ("gsm8k_test.jsonl", "gsm8k/test.jsonl"),
        "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)",
    ),
    "long_answers": Suite(1024, make=_long_answers),
    "long_prompts": Suite(128, make=_long_prompts),
}
