"""An answer while it is made and after: the steps of the loop, and the figures that follow from them.

Knows: tokens, where each came from, when it came, and what is told of the model. Does not know: how answers are made, pages, or
protocols. Every figure is counted from the steps of `lossless` (or, for the plain model, from the times at which its tokens
came); none is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lossless.generation.stats import Step

Way = Literal["accelerated", "plain"]
Ending = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Info:
    """What answers.

    Attributes:
        name: of the model, as it was asked for.
        adapter: its name, "" if there is none: then the only way is the plain one.
        precision: in what the model computes.
        device: what computes.
        threads: of the CPU.
        exact: what is promised of the accelerated way, as in `lossless.stats.Stats`; "" without an adapter.
        context: most tokens of a text, prompt and answer together.
        packed: the model's own weights are packed.
    """

    name: str
    adapter: str = ""
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1
    exact: str = ""
    context: int = 4096
    packed: bool = False


@dataclass(frozen=True)
class Waiting:
    """Another answer is being made: so many are before this one, that one included."""

    place: int


@dataclass(frozen=True)
class Answer:
    """A picture of an answer at one moment. Pictures of one answer share nothing that changes.

    Attributes:
        way: by drafts and verification, or by the base's own `generate`.
        text: decoded so far; half a character at its end is left out.
        steps: of the plain way, one for each token.
        pieces: `pieces[i]` is what token i added to the text, so that they join to it.
        ending: None while more is to come.
        prompt_tokens: of the whole conversation; `cached_tokens` of them were read in an earlier turn.
        exact: what held, as in `lossless.stats.Stats`.
        served: False if drafts were not possible for this call, and the base's own loop answered.
        why: a sentence, if not served or ended in an error; "" else.
        reread: passes beyond one a step, in which choices that were too close to call were made again.
        logprobs: of each token, if they were asked for, once the answer has ended: its own, and the likeliest tokens with theirs.
    """

    way: Way
    text: str = ""
    steps: tuple[Step, ...] = ()
    pieces: tuple[str, ...] = ()
    ending: Ending | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    exact: str = ""
    served: bool = True
    why: str = ""
    reread: int = 0
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = field(default=(), repr=False)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for step in self.steps for token in step.tokens)

    @property
    def sources(self) -> tuple[int, ...]:
        """Of each token: j for stream j, -1 for a draft from the text itself, 0 for the model's own."""
        return tuple(source for step in self.steps for source in step.sources)

    @property
    def first_s(self) -> float | None:
        """Seconds to the first token."""
        return self.steps[0].at_s if self.steps else None

    @property
    def seconds(self) -> float:
        """From the call to the last token so far."""
        return self.steps[-1].at_s if self.steps else 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Of decoding, the first token and the time to it left out."""
        if len(self.steps) < 2:
            return None
        return (len(self.tokens) - len(self.steps[0].tokens)) / max(1e-9, self.seconds - self.steps[0].at_s)

    def now_per_s(self, window_s: float = 1.0) -> float | None:
        """Tokens per second over the last moments."""
        if len(self.steps) < 2:
            return None
        start = max(0, next(i for i, step in enumerate(self.steps) if step.at_s >= self.seconds - window_s) - 1)
        start = min(start, len(self.steps) - 2)
        given = sum(len(step.tokens) for step in self.steps[start + 1 :])
        return given / max(1e-9, self.seconds - self.steps[start].at_s)

    @property
    def target_passes(self) -> int:
        """After the prefill."""
        return max(0, len(self.steps) - 1) + self.reread

    @property
    def passes_saved(self) -> int:
        """Against one pass for each token."""
        return max(0, len(self.tokens) - 1 - self.target_passes)

    @property
    def acceptance_length(self) -> float | None:
        """Emitted tokens per target pass."""
        return (len(self.tokens) - 1) / self.target_passes if self.target_passes else None

    @property
    def plain_steps(self) -> int:
        """Steps of the accelerated way that took no drafts."""
        return sum(not step.drafted for step in self.steps[1:])

    def accepted_at_depth(self) -> tuple[float, ...]:
        """Of the steps with drafts, the share that accepted a draft at depth 1, 2, ..."""
        drafted = [sum(source != 0 for source in step.sources) for step in self.steps[1:] if step.drafted]
        deepest = max(drafted, default=0)
        return tuple(sum(length >= depth for length in drafted) / len(drafted) for depth in range(1, deepest + 1))


@dataclass(frozen=True)
class Comparison:
    """Two answers to one message, token by token.

    Attributes:
        difference: place of the first token in which they differ; None if they are the same.
        margin: by how many logits the plain model preferred its own token there, if that was found.
    """

    accelerated: Answer
    plain: Answer
    margin: float | None = None

    @property
    def difference(self) -> int | None:
        one, other = self.accelerated.tokens, self.plain.tokens
        if one == other:
            return None
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    @property
    def speedup(self) -> float | None:
        """Whole answers, the time to the first token included; None if they differ or one was not finished."""
        if self.difference is not None or not {self.accelerated.ending, self.plain.ending} <= {"stop", "length"}:
            return None
        if not self.accelerated.seconds or not self.plain.seconds:
            return None
        return self.plain.seconds / self.accelerated.seconds


@dataclass(frozen=True)
class Total:
    """What answers came to in all."""

    answers: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    target_passes: int = 0
    seconds: float = 0.0

    def plus(self, answer: Answer) -> Total:
        return Total(
            self.answers + 1, self.tokens + len(answer.tokens), self.prompt_tokens + answer.prompt_tokens,
            self.cached_tokens + answer.cached_tokens, self.target_passes + answer.target_passes, self.seconds + answer.seconds,
        )  # fmt: skip
