"""Answers from one model, one at a time: for pages and programs.

Knows: ways to answer, conversations, the line of those who wait. Does not know: pages or protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .answer import Answer, Comparison, Info, Waiting, Way
from .settings import Settings

Message = dict[str, str]  # "role": "system" | "user" | "assistant", "content": text


class Conversation:
    """What one session keeps between its turns. A page keeps one in its state and never looks inside."""


class Engine:
    """One model, with an adapter or without. All methods may be called from any thread.

    Attributes:
        info: what answers.
    """

    info: Info

    @property
    def plain_tokens_per_s(self) -> float | None:
        """Median of the plain answers of this process; None until there was one."""
        raise NotImplementedError

    def conversation(self) -> Conversation:
        """A new one; it holds nothing yet."""
        raise NotImplementedError

    def check(self, messages: Sequence[Message], settings: Settings) -> None:
        """Raises UsageError for what cannot be answered: no messages, wrong roles, too long a text."""

    def answer(
        self, messages: Sequence[Message], settings: Settings, way: Way = "accelerated",
        conversation: Conversation | None = None, cancelled: Callable[[], bool] = lambda: False, logprobs: int = 0,
    ) -> Iterator[Waiting | Answer]:  # fmt: skip
        """Pictures of an answer while it grows; the last one has its `ending`. The call itself raises UsageError as `check` does."""
        raise NotImplementedError

    def compare(
        self, messages: Sequence[Message], settings: Settings,
        conversation: Conversation | None = None, cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Waiting | Answer | Comparison]:  # fmt: skip
        """The accelerated answer's pictures, then the plain one's, then both together."""
        raise NotImplementedError

    def close(self) -> None:
        """End whatever is under way."""


def load(model: str, adapter: str | None = None, dtype: str = "auto", load_in: str | None = None, device: str | None = None, pack: bool = False) -> Engine:
    """An engine from the command's flags, whose meanings are those of `lossless`."""
    raise NotImplementedError


_ = Any
