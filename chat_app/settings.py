"""What a message is answered with.

Knows: ranges. Does not know: models, pages, or protocols.
"""

from __future__ import annotations

from dataclasses import dataclass

from lossless.errors import UsageError, require_types

MOST_TOKENS = 4096  # of an answer
MOST_CHARACTERS = 100_000  # of a message
MOST_MESSAGES = 200  # of a conversation


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
        if not 0 <= self.temperature <= 5:
            raise UsageError(f"temperature must be between 0 and 5, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UsageError(f"max_tokens must be between 1 and {MOST_TOKENS}, got {self.max_tokens}")
        if len(self.stop) > 4 or not all(self.stop):
            raise UsageError(f"stop must be at most 4 strings, none of them empty, got {self.stop}")
