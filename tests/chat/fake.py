"""An engine without a model: steps with given times, the same at every call."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from chat_app.answer import Answer, Comparison, Info, Waiting, Way
from chat_app.settings import check_messages
from lossless.errors import UsageError
from lossless.generation.stats import Step

SOURCES = ((1, 2, 0), (1, 0), (0,), (1, 2, 3, 0), (-1, -1, 0))  # of the tokens of one step after the other
PASS_S = {"accelerated": 0.055, "plain": 0.05}
REPLY = (
    "Here is what you asked for, as a short list:\n\n- first, a line with **bold** words\n- then `code` in a line\n\n"
    "```python\ndef fibonacci(n):\n    a, b, numbers = 0, 1, []\n    while len(numbers) < n:\n        numbers.append(a)\n        a, b = b, a + b\n    return numbers\n```\n\n"
    "It takes as many steps as there are numbers."
)


def made(make: Callable[[], Any]) -> Any:
    """What is made, inside an event loop: outside of one Gradio makes its own for every page, and leaves it open.

    The loop has a thread of its own, since playwright's runs in this one.
    """

    async def inside() -> Any:
        return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(inside())).result()


def pieces_of(text: str) -> tuple[str, ...]:
    """Words with the blank before them."""
    found = [""]
    for sign in text:
        if sign in " \n" and found[-1].strip():
            found.append("")
        found[-1] += sign
    return tuple(found)


def recorded(text: str, way: Way = "accelerated", first_s: float = 0.2, ending: Any = "stop", drafts: bool = True) -> Answer:
    """A whole answer: its first token after `first_s`, then a step each `PASS_S`."""
    pieces = pieces_of(text)
    tokens = [sum(map(ord, piece)) for piece in pieces]
    steps, done = [Step(0, (tokens[0],), (0,), 0, first_s)], 1
    while done < len(tokens):
        sources = SOURCES[len(steps) % len(SOURCES)] if way == "accelerated" and drafts else (0,)
        took = tokens[done : done + len(sources)]
        done += len(took)
        drafted = 8 if way == "accelerated" and drafts else 0
        steps.append(Step(0, tuple(took), sources[: len(took)], drafted, first_s + len(steps) * PASS_S[way]))
    return Answer(way, text, tuple(steps), pieces, ending, prompt_tokens=12, exact="near-tie" if way == "accelerated" else "")


@dataclass
class FakeEngine:
    """What `chat_app.engine.Engine` is to the page.

    Attributes:
        pace: seconds that pass for each recorded one; 0 for tests that do not look.
        reply: of a message; by default a fixed text, or what stands behind "say: ".
        differs: the plain model's last word is another one.
        fails: answers end in an error.
    """

    adapter: str = "demo"
    pace: float = 0.0
    reply: Callable[[str], str] = lambda message: message.split("say: ", 1)[1] if "say: " in message else REPLY
    differs: bool = False
    fails: bool = False
    drafts: bool = True
    plain_tokens_per_s: float | None = None
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    running: int = 0

    def __post_init__(self) -> None:
        self.info = Info("tiny-fake", self.adapter, threads=2, exact="near-tie", context=2048)
        self._slot, self._line = threading.Lock(), 0

    def conversation(self) -> object:
        return object()

    def check(self, messages: list[dict[str, str]], settings: Any) -> None:
        check_messages(messages)
        words = sum(len(message["content"].split()) for message in messages)
        if words > 400:
            raise UsageError(f"the conversation must have at most 400 tokens, got {words}")

    def answer(self, messages: Any, settings: Any, way: Way = "accelerated", conversation: Any = None, cancelled: Any = lambda: False) -> Iterator[Any]:
        yield from self._in_turn(cancelled, lambda: self._played(messages, settings, way, cancelled))

    def compare(self, messages: Any, settings: Any, conversation: Any = None, cancelled: Any = lambda: False) -> Iterator[Any]:
        def both() -> Iterator[Any]:
            last = {}
            for way in ("accelerated", "plain"):
                for picture in self._played(messages, settings, way, cancelled):
                    last[way] = picture
                    yield picture
                if last[way].ending not in ("stop", "length"):
                    return
            yield Comparison(last["accelerated"], last["plain"], margin=0.02 if self.differs else None)

        yield from self._in_turn(cancelled, both)

    def _in_turn(self, cancelled: Any, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        place, self._line = self._line, self._line + 1
        try:
            if place:
                yield Waiting(place)
            while not self._slot.acquire(timeout=0.02):
                if cancelled():
                    return
            try:
                self.running += 1
                yield from make()
            finally:
                self.running -= 1
                self._slot.release()
        finally:
            self._line -= 1

    def _played(self, messages: list[dict[str, str]], settings: Any, way: Way, cancelled: Any) -> Iterator[Answer]:
        self.asked.append(messages)
        text = self.reply(messages[-1]["content"])
        if way == "plain" and self.differs:
            text = text.rsplit(" ", 1)[0] + " otherwise."
        whole = recorded(text, way, drafts=self.drafts)
        before = 0.0
        for i, step in enumerate(whole.steps, 1):
            time.sleep((step.at_s - before) * self.pace)
            before = step.at_s
            tokens = sum(len(s.tokens) for s in whole.steps[:i])
            picture = replace(whole, steps=whole.steps[:i], pieces=whole.pieces[:tokens], text="".join(whole.pieces[:tokens]), ending=None)
            if cancelled():
                yield replace(picture, ending="cancelled")
                return
            if self.fails:
                yield replace(picture, ending="error", why="the model failed: out of memory")
                return
            yield picture
        if way == "plain":
            self.plain_tokens_per_s = whole.tokens_per_s
        yield whole
