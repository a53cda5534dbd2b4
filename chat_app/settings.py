"""What is asked: messages, and how the answer to them is decoded.

Knows: ranges, and which conversations make sense. Does not know: models, pages, or protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lossless.errors import UsageError, require_one_of, require_types

Message = dict[str, Any]  # "role": system, user or assistant; "content": text
Asked = Sequence[Message] | str  # a conversation, or a text that is gone on with as it stands

MOST_TOKENS = 4096  # of an answer
MOST_CHARACTERS = 100_000  # of a message
MOST_MESSAGES = 200  # of a conversation
MOST_STOP = 200  # characters of a stop string
LEAST_TEMPERATURE = 1e-6  # logits that are divided by less leave the range of their numbers


class TooLong(UsageError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class Settings:
    """How an answer is decoded.

    Attributes:
        temperature: 0 is greedy.
        top_p: least share of the probability that tokens are drawn from; 1 cuts nothing off.
        seed: of the draws; the same seed gives the same answer.
        max_tokens: of the answer.
        stop: strings that end it, and are not part of it.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_types(self)
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature <= 5:
            raise UsageError(f"temperature must be 0 or between {LEAST_TEMPERATURE} and 5, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UsageError(f"max_tokens must be between 1 and {MOST_TOKENS}, got {self.max_tokens}")
        if len(self.stop) > 4 or not all(0 < len(each) <= MOST_STOP for each in self.stop):
            raise UsageError(f"stop must be at most 4 strings of 1 to {MOST_STOP} characters, got {self.stop}"[:300])


def check_messages(messages: Sequence[Message]) -> None:
    """Raises UsageError for what is no conversation that ends with the user."""
    if not messages:
        raise UsageError("there must be at least one message")
    if len(messages) > MOST_MESSAGES:
        raise UsageError(f"a conversation may have at most {MOST_MESSAGES} messages, got {len(messages)}")
    for place, message in enumerate(messages):
        role = message.get("role")
        require_one_of(("system", "user", "assistant"), f"the role of message {place + 1}", role)
        if role == "system" and place:
            raise UsageError(f"a system message must be the first one, got one as message {place + 1}")
        if not isinstance(message.get("content"), str):
            raise UsageError(f"the content of message {place + 1} must be a text, got {type(message.get('content')).__name__}")
        check_length(message["content"])
    if messages[-1]["role"] != "user":
        raise UsageError(f"the last message must be the user's, got the {messages[-1]['role']}'s")


def check_length(text: str) -> None:
    """Raises TooLong for a text that is not worth counting the tokens of."""
    if len(text) > MOST_CHARACTERS:
        raise TooLong(f"a message may have at most {MOST_CHARACTERS} characters, got {len(text)}")
