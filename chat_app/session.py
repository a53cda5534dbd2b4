"""What one visitor of the page has: a conversation, what is being made for it, and the last pictures for a replay.

Knows: turns, and when to stop. Does not know: Gradio, models, or how anything looks. Two sessions share nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from lossless.errors import UsageError

from .answer import Answer, Comparison

MOST_TURNS = 100  # of a conversation, unanswered ones as well


@dataclass
class Turn:
    """A message and what came back.

    Attributes:
        text: the answer that the conversation goes on with; "" while there is none.
        other: the plain model's, if the two were compared.
        note: a sentence in place of an answer, or behind one that was cut short.
    """

    message: str
    text: str = ""
    other: str | None = None
    note: str = ""


@dataclass
class Session:
    """A conversation and the one answer that may be under way in it.

    Attributes:
        kept: the engine's `conversation()`: keys and values of what was read before.
        shown: what the figures are of, for a replay.
    """

    kept: Any
    turns: list[Turn] = field(default_factory=list)
    shown: Answer | Comparison | None = None
    run: threading.Event | None = None  # of what is under way, or was last; set when it is to stop

    def begin(self) -> threading.Event:
        """Stop what is under way; the event of what begins now."""
        self.stop()
        self.run = threading.Event()
        return self.run

    def stop(self) -> None:
        """At the next step of whatever is under way; nothing happens if nothing is."""
        if self.run is not None:
            self.run.set()

    def leave(self) -> None:
        """Stop, and let nothing that is still under way write into the conversation."""
        self.stop()
        self.run = None

    def messages(self, message: str, system: str = "", at: int | None = None) -> list[dict[str, str]]:
        """What the model is asked: the turns (before `at`) that were answered, then `message`.

        Raises:
            UsageError: an empty message, or too many turns.
        """
        if not message.strip():
            raise UsageError("a message must not be empty")
        turns = self.turns[:at]
        if len(turns) >= MOST_TURNS:
            raise UsageError(f"a conversation must have at most {MOST_TURNS} messages: clear it to go on")
        asked = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            if turn.text:
                asked += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.text}]
        return [*asked, {"role": "user", "content": message}]

    def take_back(self, number: int) -> str:
        """Drop turn `number` and all behind it; the message of that turn, "" if there is none."""
        self.leave()
        message = self.turns[number].message if 0 <= number < len(self.turns) else ""
        del self.turns[max(0, number) :]
        self.shown = None
        return message

    def clear(self) -> None:
        self.take_back(0)
