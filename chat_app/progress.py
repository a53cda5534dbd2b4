"""One call of `generate`, followed token by token, and ended by what ends an answer.

Knows: how tokens become text, stop strings, cancellation, and the clock. Does not know: models, or who asks. Both ways to answer
ask it once about each token, in order, so that an answer ends at the same token either way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from transformers import StoppingCriteria

from lossless.generation.stats import Stats, Step

from .answer import Answer, Ending, Way
from .settings import Settings

_HALF = "\N{REPLACEMENT CHARACTER}"  # what half a character is decoded to
_WINDOW = 16  # tokens that are decoded together: what one looks like may depend on those before it


class Detokenizer:
    """Text, token by token: what each adds, special tokens skipped.

    A token that ends within a character adds nothing of it; the token that completes it adds it whole. Tokenizers that spell a
    character out in bytes may show several halves until then, in place of the characters before it as well.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = 0  # characters of the window that were added

    def add(self, token: int) -> str:
        """What this token adds to the text."""
        self._window.append(token)
        text = self._decode(self._window)
        piece = text.rstrip(_HALF)[self._told :]
        self._told += len(piece)
        if len(self._window) >= _WINDOW and self._told == len(text):
            later = self._window[len(self._window) // 2 :]
            if text.endswith(rest := self._decode(later)):  # else it would begin within a character
                self._window, self._told = later, len(rest)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Progress(StoppingCriteria):
    """What a call has given so far; other threads may look at it while it grows.

    Args:
        eos: ids that end an answer.
        given_up: asked after every token.
        stats: where the call's statistics are found once it runs; None for the model's own `generate`.

    Attributes:
        news: set with every token, and at the end.
        done: set once nothing more will come.
    """

    def __init__(
        self, way: Way, tokenizer: Any, settings: Settings, room: int, eos: frozenset[int],
        given_up: Callable[[], bool], stats: Callable[[], Stats] | None = None,
    ) -> None:  # fmt: skip
        self.way, self._settings, self._room, self._eos = way, settings, room, eos
        self._given_up, self._find_stats = given_up, stats
        self._detokenizer = Detokenizer(tokenizer)
        self._stats: Stats | None = None
        self._steps: list[Step] = []  # of the model's own generate
        self._pieces: list[str] = []
        self._text, self._cut = "", None  # type: tuple[str, int | None]
        self._ending: Ending | None = None
        self._began = time.perf_counter()
        self.ending: Ending | None = None  # once the call is over
        self.prompt_tokens = self.cached_tokens = 0
        self.why = ""
        self.logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
        self.news, self.done = threading.Event(), threading.Event()

    def start(self) -> None:
        """The call begins now."""
        self._began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """`[1]`: whether the answer ends with the last of these `[1, length]` ids. On a GPU, HF's loop may ask once more behind the end."""
        if self._ending is None:
            self._note(int(input_ids[0, -1]))
        return torch.full((1,), self._ending is not None, dtype=torch.bool, device=input_ids.device)

    def _note(self, token: int) -> None:
        if self._find_stats is not None and self._stats is None:
            self._stats = self._find_stats()  # each call has its own
        self._steps.append(Step(0, (token,), (0,), 0, time.perf_counter() - self._began))
        piece = self._detokenizer.add(token)
        searched = len(self._text) - max(map(len, self._settings.stop), default=0)
        self._text += piece
        self._pieces.append(piece)
        found = [at for stop in self._settings.stop if (at := self._text.find(stop, max(0, searched))) >= 0]
        if token in self._eos:
            self._ending = "stop"
        elif found:
            self._ending, self._cut = "stop", min(found)
        elif len(self._steps) >= self._room:
            self._ending = "length"
        elif self._given_up():
            self._ending = "cancelled"
        self.news.set()

    def end(self, failure: str = "") -> None:
        """The call is over; if it never gave a token, or failed, that is how the answer ends."""
        self.why = failure
        self.ending = "error" if failure else self._ending or "cancelled"
        self.news.set()
        self.done.set()

    @property
    def served(self) -> bool:
        """Whether the steps are those of the accelerated loop."""
        return self._stats is not None and self._stats.served

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._stats.steps if self._stats is not None and self.served else self._steps)

    def picture(self) -> Answer:
        """The answer as it is now."""
        ending = self.ending  # first: the last picture must not be of an earlier moment
        stats = self._stats
        passes = 0 if stats is None else stats.target_passes  # before the steps, or the last of them would look like one too few
        steps = self.steps
        pieces = self._pieces[: sum(len(step.tokens) for step in steps)]
        text = "".join(pieces)
        text = text[: self._shown(text, ending)]
        pieces = [text[start : start + len(piece)] for start, piece in zip(accumulate(map(len, pieces), initial=0), pieces, strict=False)]
        served = self.way == "plain" or stats is None or stats.served
        return Answer(
            way=self.way, text=text, steps=steps, pieces=tuple(pieces), ending=ending, prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens, exact=stats.exact if stats is not None and stats.served else "", served=served,
            why=self.why or ("" if served or stats is None else stats.why), reread=max(0, passes - max(0, len(steps) - 1)),
            logprobs=self.logprobs,
        )  # fmt: skip

    def _shown(self, text: str, ending: Ending | None) -> int:
        """How much of the text is shown: not a stop string, and, while more is to come, not what may be the beginning of one."""
        if self._cut is not None and (ending or len(text) >= self._cut):
            return self._cut
        if ending:
            return len(text)
        return len(text) - max((n for stop in self._settings.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
