"""The text so far, and the base's own choice after it: HF's sampling step, one position at a time.

Knows: logits processors, stopping criteria, streamers, and what `generate` returns. Does not
know: drafts, passes, or caches. Positions of one text are chosen in order, each once, as HF's loop would;
texts of a batch may run ahead of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..base.layers import CACHE
from ..drafting.ngram import NGramCache
from ..drafting.noise import NoiseTape


class Sequence:
    """One text of a batch, prompt and answer.

    Args:
        number: which sequence it is; ids: `[1, prompt]`, padding included.
        padding: columns without a token at the start; before: columns of the prompt that are not among the ids.
        processor, criteria, config: as HF prepared them.
        noise: of the batch, None if decoding is greedy.
        ngrams: what the drafter recalls from, or None.
        guard: how much closer than its rival a choice may not be, in logits, if its row was not read alone.
    """

    def __init__(
        self,
        number: int,
        ids: torch.Tensor,
        padding: int,
        before: int,
        processor: Any,
        criteria: Any,
        config: GenerationConfig,
        noise: NoiseTape | None,
        ngrams: NGramCache | None,
        streamer: Any = None,
        guard: float = 0.0,
    ) -> None:
        penalty, heat = config.repetition_penalty or 1.0, config.temperature or 1.0
        self._magnified = max(penalty, 1 / penalty) / (1.0 if noise is None else min(1.0, heat))
        self.widen(guard)
        self.number, self.ids, self.prompt, self.before = number, ids, ids.shape[1], before
        self.start = padding - before  # of the text, counted in ids
        self.processor, self.criteria, self.config = _of_one(processor, number), criteria, config
        self._asked_from, self._enders = what_may_end(criteria)
        # top-p cuts by how much is left below a token: all of that may be a little less likely at once
        self._by_mass = any(isinstance(each, TopPLogitsWarper) for each in processor)
        self._by_rank = all(type(each) in (TemperatureLogitsWarper, TopKLogitsWarper) for each in processor)  # what is cut hangs on nothing else
        self.noise, self.ngrams, self.streamer = noise, ngrams, streamer
        self.stopped = False
        self.num_exact_rows = ids.shape[1]  # so many of its rows were read in the base's own shapes: the prompt at once, others alone
        keep = config.return_dict_in_generate
        self.scores: tuple[torch.Tensor, ...] | None = () if keep and config.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep and config.output_logits else None
        self._copies = bool(self.processor) or self.scores is not None or self.logits is not None  # of logits, which processors may change, or a caller keeps

    def widen(self, guard: float) -> None:
        """From now on choices are guarded so."""
        self.off_by, self.guard = guard, guard * self._magnified  # of logits, and of what they are chosen by

    @property
    def last(self) -> int:
        """The last token: certain, but not yet read by the base."""
        return int(self.ids[0, -1])

    @property
    def position(self) -> int:
        """Its place in the text."""
        return self.ids.shape[1] - 1 - self.start

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return int(self.config.max_length) - self.ids.shape[1]

    @property
    def emitted(self) -> int:
        return self.ids.shape[1] - self.prompt

    def choose(self, logits: torch.Tensor, alone: bool = True) -> tuple[int, bool] | None:
        """The base's choice given `[vocab]` logits, and whether it ends the text.

        Greedy is argmax; sampled is the very draw that `model.generate` makes at this position.

        Args:
            alone: the row was read in a pass of its own. If not, and another token is closer to the choice than
                the guard allows, the answer is None, and the position must be asked for again, alone.
        """
        raw = logits[None].to(copy=self._copies, dtype=torch.float32, device=self.ids.device)
        scores = self.processor(self.ids, raw)
        ranking, noise = scores, None
        if self.noise is not None:
            probabilities = torch.softmax(scores, dim=-1)
            noise = self.noise.at(self.number, probabilities)
            ranking = probabilities / noise
        token = largest(ranking[0])
        if noise is not None and bool(probabilities[0, token].isnan()):
            torch.multinomial(probabilities, num_samples=1)  # refuses, as in the base's own loop
        if not alone and self.guard and self._is_near_tie(logits, scores, ranking, noise, token):
            return None
        if self.noise is not None:
            self.noise.go_on(self.number)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=-1)
        if self.ids.shape[1] >= self._asked_from or token in self._enders:
            self.stopped = bool(self.criteria(self.ids, self.scores)[0])
        if self.streamer is not None:
            self.streamer.put(self.ids[0, -1:].cpu())
            if self.stopped:
                self.streamer.end()
        if self.stopped and self.noise is not None:
            self.noise.leave(self.number)
        return token, self.stopped

    def _is_near_tie(
        self, logits: torch.Tensor, scores: torch.Tensor, ranking: torch.Tensor, noise: torch.Tensor | None, token: int
    ) -> bool:
        """Whether logits that are off by as much as the guard could have led to another choice than this token.

        logits: `[vocab]`; scores, ranking: `[1, vocab]`, as processed, and as perturbed by the noise, `[vocab]`.
        """
        best = float(ranking[0, token])
        least = best - self.guard if noise is None else best * math.exp(-self.guard)
        if at_least(ranking[0], least) > 1:
            return True
        if noise is None or (self._by_rank and self._is_cut_clearly(logits, scores[0], token)) or not (cut := scores[0] == -torch.inf).any():
            return False
        # What top-k, top-p and the like cut off may hang on a little, too. Would the token still be there if it
        # were less likely? Would one be there that would have been chosen in its place, if it were likelier?
        raw = logits[None].to(copy=True, dtype=torch.float32, device=self.ids.device)
        lower = raw.clone()
        lower[0, token] -= self.off_by
        if self._cut(lower)[token] or (self._by_mass and self._cut(raw - self.off_by * (scores <= scores[0, token]))[token]):
            return True
        perturbed = raw[0] / (self.config.temperature or 1.0) - noise.log()
        standing = torch.minimum(perturbed[token], scores[0, token] - noise[token].log())  # a penalty may have lowered it
        rivals = cut & (perturbed > standing - self.guard)
        if not rivals.any():
            return False
        higher = raw + self.off_by * (cut & (raw[0] <= raw[0, rivals].max()) if self._by_mass else rivals)
        return not bool(self._cut(higher)[rivals].all())

    def _is_cut_clearly(self, logits: torch.Tensor, scores: torch.Tensor, token: int) -> bool:
        """Whether top-k would keep the same tokens, and this one well among them, if any of these logits `[vocab]` were off."""
        if not (_numpy_reads(logits) and _numpy_reads(scores)):
            return False
        raw, kept = logits.numpy(), np.flatnonzero(scores.numpy() != -np.inf)
        least = float(raw[kept].min())
        return bool(raw[token] > least + 2 * self.off_by and np.count_nonzero(raw >= least - 2 * self.off_by) == len(kept))

    def _cut(self, raw: torch.Tensor) -> torch.Tensor:
        """`[vocab]`: which tokens could not be chosen if the base had said these logits, `[1, vocab]`."""
        return self.processor(self.ids, raw)[0] == -torch.inf

    def choose_alone(self, logits: torch.Tensor) -> tuple[int, ...]:
        """The choice given `[vocab]` logits of a row that was read in the base's own shape."""
        self.choose(logits)
        return (self.last,)

    def choose_after(self, logits: torch.Tensor, native: bool) -> Callable[[int], tuple[int, bool] | None]:
        """For `accept`: node -> the choice after it, given `[nodes, vocab]`; None if it is too close to call.

        A pass of one row, in the base's own weights (`native`), is as good as the base's own only if the rows that it looks
        back at are.
        """
        alone = native and len(logits) == 1 and self.num_exact_rows == self.ids.shape[1] - 1
        self.num_exact_rows += alone
        return lambda node: self.choose(logits[node], alone)

    def remember(self, tokens: tuple[int, ...]) -> None:
        """Tokens that were chosen: what the drafter recalls from."""
        if self.ngrams is not None:
            self.ngrams.extend(tokens)


def what_may_end(criteria: Any) -> tuple[float, frozenset[int]]:
    """From which length on HF's criteria may end a text, and by which tokens before it: else they need not be asked."""
    length, tokens = math.inf, frozenset[int]()
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            length = min(length, each.max_length, (each.max_position_embeddings or math.inf) + 1)  # behind that it warns
        elif type(each) is EosTokenCriteria:
            tokens |= frozenset(each.eos_token_id.flatten().tolist())
        else:
            return 0, tokens
    return length, tokens


def largest(row: torch.Tensor) -> int:
    """`torch.argmax` of `[vocab]`, the first of equals: on a CPU numpy takes a tenth of the time."""
    return int(row.numpy().argmax() if _numpy_reads(row) else row.argmax())


def at_least(row: torch.Tensor, bound: float) -> int:
    """How many of `[vocab]` are not below a bound."""
    return int(np.count_nonzero(row.numpy() >= bound) if _numpy_reads(row) else torch.count_nonzero(row >= bound))


def _numpy_reads(row: torch.Tensor) -> bool:
    """Whether numpy can look at these numbers where they are."""
    return row.device.type == "cpu" and row.dtype is torch.float32 and not row.requires_grad


def _of_one(processors: Any, number: int) -> Any:
    """The processors as sequence `number` of the batch is to see them: it will be called alone."""
    alone = type(processors)()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            processor = PrefixConstrainedLogitsProcessor(_asked_once(number, processor._prefix_allowed_tokens_fn), 1)
        ignored = getattr(processor, "prompt_ignore_length", None)  # of a repetition penalty: the padding
        if isinstance(ignored, torch.Tensor):
            processor = copy(processor)
            processor.prompt_ignore_length = ignored[number : number + 1]
        alone.append(processor)
    return alone


def remembering(processors: Any) -> Any:
    """These processors; what a caller's function allows is remembered of each text and length: a batch may be answered again by the base."""
    again = type(processors)()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            processor = PrefixConstrainedLogitsProcessor(_remembered(processor._prefix_allowed_tokens_fn), processor._num_beams)
        again.append(processor)
    return again


def _remembered(allowed: Callable[[int, torch.Tensor], list[int]]) -> Callable[[int, torch.Tensor], list[int]]:
    answers: dict[tuple[int, int], list[int]] = {}

    def ask(number: int, ids: torch.Tensor) -> list[int]:
        key = (number, len(ids))
        if key not in answers:
            answers[key] = allowed(number, ids)
        return answers[key]

    return ask


def _asked_once(number: int, allowed: Callable[[int, torch.Tensor], list[int]]) -> Callable[[int, torch.Tensor], list[int]]:
    """A caller's function, for sequence `number`: it may count its calls, and its processor may be called again for a position."""
    length, answer = -1, list[int]()

    def ask(_: int, ids: torch.Tensor) -> list[int]:
        nonlocal length, answer
        if len(ids) != length:
            length, answer = len(ids), allowed(number, ids)
        return answer

    return ask


def result(sequences: list[Sequence], cache: Any) -> Any:
    """What `generate` returns: sequences `[batch, length]`, shorter ones filled with the padding token."""
    config, longest = sequences[0].config, max(sequence.ids.shape[1] for sequence in sequences)
    pad = getattr(config, "_pad_token_tensor", None)
    filler = 0 if pad is None else int(pad)
    rows = [torch.nn.functional.pad(sequence.ids, (0, longest - sequence.ids.shape[1]), value=filler) for sequence in sequences]
    if not config.return_dict_in_generate:
        return torch.cat(rows)
    found: dict[str, Any] = {"sequences": torch.cat(rows), "scores": sequences[0].scores, "logits": sequences[0].logits}
    return GenerateDecoderOnlyOutput(**found | {CACHE: cache if len(sequences) == 1 else None})
