"""One answer with the time of each of its tokens, by one clock for everybody.

Knows: what is asked of `generate`, and when each token was there. Does not know: who is timed against whom, or what a
report holds.

The clock is a stopping criterion, so it counts the same way for every model that Hugging Face's `generate` drives.
Decode time runs from the first token to the last; what lies before the first, the prefill, is told apart as the time to
first token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..base.layers import context_limit
from ..base.loading import Base, check_tokens
from ..distillation.prompts import Prompt, encode
from ..errors import UsageError, require_at_least, require_seed, require_types


@dataclass(frozen=True)
class Decoding:
    """What is asked of `generate` on every side."""

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(1, self, "max_new_tokens")
        require_seed(self.seed)
        if self.temperature <= 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        if self.do_sample:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return found


class Clock(StoppingCriteria):
    """Notes when each token was there; never stops anything.

    Args:
        length: tokens of the prompt. A loop that emits several at once has the criteria called once for all of them.

    Attributes:
        began: seconds, when the clock was made.
        ticks: seconds, one for each token; those that came together have the same.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.ticks: list[float] = []
        self.began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.tick(input_ids.shape[1] - self.length - len(self.ticks))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def tick(self, tokens: int = 1) -> None:
        """So many tokens are there now."""
        self.ticks += [time.perf_counter()] * tokens

    @property
    def time_to_first_token_s(self) -> float:
        return self.ticks[0] - self.began

    @property
    def decode_s(self) -> float:
        return self.ticks[-1] - self.ticks[0]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after those that came first; 0 for an answer that came at once, which has no decode time."""
        later = sum(tick > self.ticks[0] for tick in self.ticks)
        return later / self.decode_s if later else 0.0


def encode_checked(base: Base, prompts: list[Prompt], decoding: Decoding) -> list[torch.Tensor]:
    """Token ids `[1, length]` of every prompt, each checked against the model's context.

    Raises:
        UsageError: a prompt and its answer would not fit, or the tokenizer is another model's.
    """
    limit = context_limit(base.model)
    found = []
    for prompt in prompts:
        ids = encode(base.tokenizer, prompt.messages)
        check_tokens(ids, base.model)
        if limit is not None and len(ids) + decoding.max_new_tokens > limit:
            raise UsageError(
                f"prompt {prompt.id!r} has {len(ids)} tokens; with max_new_tokens={decoding.max_new_tokens} "
                f"that exceeds the model's context of {limit}"
            )
        found.append(torch.tensor([ids], device=base.model.device))
    return found


def timed_generate(model: Any, ids: torch.Tensor, decoding: Decoding, **options: Any) -> tuple[list[int], Clock]:
    """Answer token ids and when they came.

    Args:
        model: a base or an `AcceleratedModel`; ids: `[1, prompt]`; options: further arguments of its `generate`.
    """
    torch.manual_seed(decoding.seed)
    clock = Clock(ids.shape[1])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([clock]),
        **decoding.arguments(),
        **options,
    )
    tokens = out[0, ids.shape[1] :].tolist()
    del clock.ticks[len(tokens) :]  # the criteria may be shown drafts behind the last token, which are then cut off
    return tokens, clock
