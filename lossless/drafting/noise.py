"""Sampling noise: the random draws of a sampled batch, made in the base's own order, and looked ahead at for drafts.

Knows: how `torch.multinomial` draws, and how to look ahead without drawing. Does not know: texts, trees, or the base's
logits.

`torch.multinomial(p, 1)` is argmax(p / q) with q exponential noise of p's shape from the generator. Of a position that is
yet to come, p is not known, but q is: a generator can be asked and put back. So a draft need not guess what will be
drawn. Where the base will choose argmax(p / q), it ranks tokens by p~ / q^a, with the p~ that it drafts and a trust in the
noise a < 1, because p~ is not p: a token that is likely but unlucky may well be chosen all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PEEKABLE = ("cpu", "cuda")  # devices whose generators are known to be put back as they were
_TRUST = 0.9  # a
_FEW = 128  # tokens: of more the whole vocabulary is perturbed


@dataclass(frozen=True)
class _Peeked:
    """A draw that is yet to come, `[batch, vocab]`, and the generator's states before and after it."""

    before: torch.Tensor
    noise: torch.Tensor
    after: torch.Tensor


class NoiseTape:
    """The draws of a sampled batch, one for each position, in the order of the text.

    HF draws noise of shape `[batch, vocab]` once for each position of the whole batch; so does the tape, when the first
    text of the batch gets there, and it keeps the draw for the others. What was looked at ahead is drawn by putting the generator
    where it would be after the draw, so no noise is made twice.
    """

    def __init__(self, texts: int) -> None:
        self._read = [0] * texts  # positions that each text has passed
        self._first = 0  # position of the first draw that is kept
        self._draws: list[torch.Tensor] = []
        self._peeked: deque[_Peeked] = deque()  # the draws after those

    def at(self, text: int, like: torch.Tensor) -> torch.Tensor:
        """`[vocab]`, the noise for the next position of this text; `like` is `[1, vocab]` of probabilities."""
        position = self._read[text]
        while position >= self._first + len(self._draws):
            self._draws.append(self._draw(like))
        return self._draws[position - self._first][text]

    def peek(self, texts: Sequence[int], count: int, like: torch.Tensor) -> torch.Tensor:
        """`[texts, count, vocab]`, the noise for the next positions of these texts, without drawing it."""
        begins = [self._read[text] - self._first for text in texts]
        generator = generator_of(like.device)
        here = generator.get_state()
        self._check(here)
        if self._peeked:
            generator.set_state(self._peeked[-1].after)
        for _ in range(max(begins) + count - len(self._draws) - len(self._peeked)):
            before = generator.get_state()
            self._peeked.append(_Peeked(before, self._noise(like), generator.get_state()))
        generator.set_state(here)
        known = [*self._draws, *(drawn.noise for drawn in self._peeked)]
        return torch.stack([torch.stack([known[begin + i][text] for i in range(count)]) for text, begin in zip(texts, begins, strict=True)])

    def go_on(self, text: int) -> None:
        """This text's next position is chosen."""
        self._read[text] += 1
        self._forget()

    def leave(self, text: int) -> None:
        """This text is finished."""
        self._read[text] = self._first + len(self._draws) + 2**31
        self._forget()

    def _draw(self, like: torch.Tensor) -> torch.Tensor:
        if self._peeked:
            generator = generator_of(like.device)
            self._check(generator.get_state())
            if self._peeked:
                generator.set_state(self._peeked[0].after)
                return self._peeked.popleft().noise
        return self._noise(like)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(len(self._read), like.shape[1]).exponential_(1)

    def _check(self, state: torch.Tensor) -> None:
        """Nothing ahead is known any more if someone else has drawn from the generator since."""
        if self._peeked and not torch.equal(self._peeked[0].before, state):
            self._peeked.clear()

    def _forget(self) -> None:
        while self._draws and min(self._read) > self._first:
            del self._draws[0]
            self._first += 1


@dataclass(frozen=True)
class NoiseBias:
    """What sampling will make of logits, as far as it is known beforehand.

    Attributes:
        noise: `[texts, ahead, vocab]`, q of the next positions of each text.
        temperature, top_k: of the sampling; other processors are not looked at, and cost no more than a draft.
    """

    noise: torch.Tensor
    temperature: float
    top_k: int

    def perturb(self, logits: torch.Tensor, texts: torch.Tensor, ahead: int, ids: torch.Tensor | None) -> torch.Tensor:
        """Logits of what will be chosen, from those of what is likely; at temperature 0 they are the same.

        Args:
            logits: `[rows, draft vocabulary]`; ids: the tokens they are of, None for all.
            texts: `[rows]`, whose they are; ahead: for which of the next positions, from 0.
        """
        noise = self.noise[:, ahead] if ids is None else self.noise[:, ahead, ids.to(self.noise.device)]
        if 0 < self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        return self._perturbed(logits, _luck(noise).to(logits.device)[texts])

    @property
    def cut(self) -> int:
        """How many of the likeliest tokens can be chosen at all, if those are few; else 0."""
        return self.top_k if self.top_k <= _FEW else 0

    def best(self, tokens: torch.Tensor, scores: torch.Tensor, texts: torch.Tensor, ahead: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the few tokens that can be chosen: of them the `count` that are the likeliest now, best first, and their log
        probabilities, `[rows, count]`.

        tokens, scores: `[rows, few]`, the likeliest tokens and their logits, less a number for each row.
        """
        top = self._perturbed(scores, _luck(self.noise[texts[:, None], ahead, tokens.long()])).log_softmax(-1).topk(min(count, scores.shape[1]))
        return tokens.gather(1, top.indices), top.values

    def _perturbed(self, logits: torch.Tensor, luck: torch.Tensor) -> torch.Tensor:
        # divided by a low temperature, drafted logits would be surer of themselves than they have reason to be
        return (logits + _TRUST * self.temperature * luck) / max(1.0, self.temperature)


def _luck(noise: torch.Tensor) -> torch.Tensor:
    """How much likelier than its logit says a token is to be chosen."""
    return -noise.clamp_min(1e-30).log()


def generator_of(device: torch.device) -> torch.Generator:
    """The one that draws on this device if none is named."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
