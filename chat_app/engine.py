"""Answers from one model, one at a time: for pages and programs.

Knows: the two ways to answer, what is asked of `generate` for them, and which rows of a conversation are kept. Does not know:
pages or protocols.

An accelerated answer has the tokens that the base's own `generate` gives from the same kept rows and the same seed, and a plain one
is just that. Rows that were read in an earlier turn are rounded as they were read then: in float32 that changes no token short of a
tie between two; in 16 bits an answer may differ from one for which the whole conversation is read anew, and so may the base's own.
"""

from __future__ import annotations

import logging
import statistics
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lossless.base.layers import CACHE, context_limit, input_device
from lossless.base.loading import check_tokens, load_base, precision
from lossless.base.packed import is_packed, pack
from lossless.base.processes import device_name, free_memory
from lossless.distillation.prompts import encode
from lossless.errors import UsageError, require_one_of
from lossless.generation.model import AcceleratedModel, accelerate

from .answer import Answer, Comparison, Info, Total, Waiting, Way
from .kept import Conversation, Kept, copied, keepable
from .progress import Progress
from .settings import Asked, Settings, TooLong, check_messages, check_text
from .slot import Job, Slot

MOST_WAITING = 64  # answers that may be asked for at once
MOST_LOGPROBS, MOST_TOKENS_WITH_LOGPROBS = 20, 512  # a row of the whole vocabulary is held for each token

_PICTURE_S = 0.05  # least time between two pictures of an answer
_KEPT_BYTES, _KEPT_SHARE = 4 * 2**30, 0.125  # of keys and values: at most so many, and so much of the memory that is free
_CONTEXT = 32768  # of models that do not say theirs
_MEDIAN_OF = 32  # plain answers whose speed is remembered
_FEWEST_STEPS = 8  # a shorter answer says little of speed
_GREETING, _WARM_TOKENS = [{"role": "user", "content": "Hello"}], 12

_log = logging.getLogger(__name__)


class Busy(UsageError):
    """Too many answers are asked for at once."""


class Engine:
    """One model, with an adapter or without. All methods may be called from any thread.

    Args:
        model, tokenizer: the base.
        fast: the base with an adapter attached, or None: then the only way is the plain one.
        info: what answers.
        kept_bytes: most bytes of keys and values that are kept between turns, of all conversations together.
        slot: where the model was loaded, and works; one of its own by default.
    """

    def __init__(
        self, model: Any, tokenizer: Any, fast: AcceleratedModel | None, info: Info, kept_bytes: int = 2**30, slot: Slot | None = None
    ) -> None:
        self.model, self.tokenizer, self.fast, self.info = model, tokenizer, fast, info
        self._eos = _ids(model.generation_config.eos_token_id)
        self._kept = Kept(kept_bytes) if keepable(model) else None
        self._plain_speeds: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._totals: dict[tuple[str, str], Total] = {}
        self._slot = slot or Slot()
        self.close = weakref.finalize(self, self._slot.close)  # at the latest when the process ends

    @property
    def plain_tokens_per_s(self) -> float | None:
        """Median of the plain answers of this process; None until there was one."""
        return statistics.median(speeds) if (speeds := list(self._plain_speeds)) else None

    @property
    def waiting(self) -> int:
        """Answers that wait or are being made."""
        return len(self._slot)

    @property
    def kept_bytes(self) -> int:
        """Of keys and values that are kept between turns."""
        return 0 if self._kept is None else self._kept.nbytes

    def totals(self) -> dict[tuple[str, str], Total]:
        """By way and ending, of the answers that were begun."""
        return dict(self._totals)

    def _count(self, answer: Answer) -> None:
        """Called in the slot's thread only."""
        key = (answer.way, str(answer.ending))
        self._totals[key] = self._totals.get(key, Total()).plus(answer)
        if answer.way == "plain" and len(answer.steps) >= _FEWEST_STEPS and answer.tokens_per_s is not None:
            self._plain_speeds.append(answer.tokens_per_s)

    def conversation(self, most: int = 1) -> Conversation:
        """A new one, which holds nothing yet.

        Args:
            most: texts whose rows it keeps. More than 1 for a program that sends several conversations in turn: the one that a
                prompt has most in common with is taken.
        """
        return Conversation(most)

    def check(self, messages: Asked, settings: Settings) -> None:
        """Raises UsageError for what cannot be answered: no messages, wrong roles, too long a text (TooLong)."""
        self._encode(messages)

    def answer(
        self, messages: Asked, settings: Settings, way: Way = "accelerated", conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False, logprobs: int | None = None,
    ) -> Iterator[Waiting | Answer]:  # fmt: skip
        """Pictures of an answer while it grows, `Waiting` before that; the last one has its `ending`.

        An answer has at most as many tokens as the model's context leaves room for. Closing the iterator cancels. It joins the line
        when it is first asked for an item, and a failure within it is the answer's ending.

        Args:
            conversation: keeps rows from here on; None keeps nothing.
            cancelled: asked while waiting and after every token.
            logprobs: for each token its logarithmic probability, and those of so many likeliest ones, by the model's own
                distribution, before temperature and top-p; 0 for its own only, None for none.

        Raises:
            UsageError: by the call itself, as `check` does; no adapter for the accelerated way; too many that wait (Busy).
        """
        require_one_of(("accelerated", "plain"), "way", way)
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs must be between 0 and {MOST_LOGPROBS}, got {logprobs}")
        if logprobs is not None and settings.max_tokens > MOST_TOKENS_WITH_LOGPROBS:
            raise UsageError(f"max_tokens must be at most {MOST_TOKENS_WITH_LOGPROBS} with logprobs, got {settings.max_tokens}")
        call = _Call(self, self._admit(messages, (way,)), settings, (way,), conversation, cancelled, logprobs)
        return call.events()

    def compare(
        self, messages: Asked, settings: Settings, conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Waiting | Answer | Comparison]:  # fmt: skip
        """The accelerated answer's pictures, then the plain one's, then both together; nobody else is served between them.

        Both start from the same kept rows. If the first is cancelled or fails, the second is cancelled.
        """
        ways: tuple[Way, ...] = ("accelerated", "plain")
        call = _Call(self, self._admit(messages, ways), settings, ways, conversation, cancelled)
        return call.events()

    def _admit(self, messages: Asked, ways: Sequence[Way]) -> list[int]:
        if "accelerated" in ways and self.fast is None:
            raise UsageError(f"there is no adapter for {self.info.name}: the only way is the plain one")
        if len(self._slot) >= MOST_WAITING:
            raise Busy(f"at most {MOST_WAITING} answers can be asked for at once: try again later")
        return self._encode(messages)

    def _encode(self, messages: Asked) -> list[int]:
        """The prompt's ids."""
        if isinstance(messages, str):
            check_text(messages)
            ids = list(self.tokenizer(messages)["input_ids"])
        else:
            check_messages(messages)
            ids = encode(self.tokenizer, messages)
        check_tokens(ids, self.model)
        if len(ids) >= self.info.context:
            raise TooLong(f"a prompt must have less than {self.info.context} tokens, this one has {len(ids)}: shorten it or begin anew")
        return ids


class _Call:
    """One asking: an answer, or two of them to compare."""

    def __init__(
        self, engine: Engine, ids: list[int], settings: Settings, ways: tuple[Way, ...],
        conversation: Conversation | None, cancelled: Callable[[], bool], logprobs: int | None = None,
    ) -> None:  # fmt: skip
        self._engine, self._ids, self._settings, self._logprobs = engine, ids, settings, logprobs
        self._conversation = conversation if engine._kept is not None else None
        self._room = min(settings.max_tokens, engine.info.context - len(ids))
        self._margin: float | None = None
        self._job = Job(cancelled)
        self._parts = [self._progress(way) for way in ways]

    def _progress(self, way: Way) -> Progress:
        engine = self._engine
        stats = (lambda: engine.fast.stats) if engine.fast is not None and way == "accelerated" else None  # type: ignore[union-attr]
        return Progress(way, engine.tokenizer, self._settings, self._room, engine._eos, self._job.given_up, stats)

    def events(self) -> Iterator[Any]:
        """What the caller sees; it makes nothing itself, and may be left at any time."""
        slot, job = self._engine._slot, self._job
        slot.join(job, self._work)
        try:
            shown_place = 0
            while not job.done.is_set() and (place := slot.place(job)):
                if place != shown_place:
                    yield Waiting(place)
                shown_place = place
                if job.given_up():
                    slot.leave(job)
                job.done.wait(_PICTURE_S)
            pictures = []
            for part in self._parts:
                shown = 0
                while not part.done.is_set() and not job.done.is_set():
                    part.news.wait(_PICTURE_S)
                    part.news.clear()
                    if (given := len(part.steps)) > shown and not part.done.is_set():
                        yield part.picture()
                        shown = given
                        part.done.wait(_PICTURE_S)
                if part is self._parts[-1]:
                    job.done.wait()  # whoever asks next must not find this job still before it
                if not part.done.is_set():  # the job is over, and did not come to this
                    part.end()
                pictures.append(part.picture())
                yield pictures[-1]
            if len(pictures) == 2:
                yield Comparison(pictures[0], pictures[1], self._margin)
        finally:
            slot.leave(job)

    def _work(self) -> None:
        """In the slot's thread."""
        kept = self._engine._kept
        start, rows = kept.find(self._conversation, self._ids) if kept is not None and self._conversation is not None else (None, 0)
        for part in self._parts:
            self._generate(part, start, rows)
            if part.ending in ("cancelled", "error"):
                return
        if len(self._parts) == 2 and self._settings.temperature == 0:
            accelerated, plain = self._parts
            self._margin = self._find_margin(Comparison(accelerated.picture(), plain.picture()))

    def _generate(self, part: Progress, start: Any, rows: int) -> None:
        engine, settings = self._engine, self._settings
        part.prompt_tokens, part.cached_tokens = len(self._ids), rows
        failure = ""
        try:
            model = engine.fast if part.way == "accelerated" else engine.model
            ids = torch.tensor([self._ids], device=input_device(engine.model))
            arguments = _arguments(settings) | {"max_new_tokens": self._room, "stopping_criteria": [part]}
            cache = None
            if self._conversation is not None:
                arguments[CACHE] = cache = copied(start, rows)
            if self._logprobs is not None:
                arguments |= {"return_dict_in_generate": True, "output_logits": True}
            torch.manual_seed(settings.seed)
            part.start()
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)  # type: ignore[union-attr]
            if self._logprobs is not None:
                part.logprobs = _logprobs(found.logits, [token for step in part.steps for token in step.tokens], self._logprobs)
            if cache is not None:
                tokens = [token for step in part.steps for token in step.tokens]
                engine._kept.keep(self._conversation, [*self._ids, *tokens], cache)  # type: ignore[union-attr, arg-type]
        except Exception as error:  # whatever a model stumbles over: the next answer must not suffer from it
            _log.exception("an answer failed")
            what = "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else _first_line(error)
            failure = f"the answer could not be finished: {what}"
        part.end(failure)
        engine._count(part.picture())

    @torch.no_grad()
    def _find_margin(self, both: Comparison) -> float | None:
        """By how many logits the base prefers its own token at the first difference; None if the answers do not part at a token."""
        place, plain, other = both.difference, both.plain.tokens, both.accelerated.tokens
        if place is None or place >= min(len(plain), len(other)):
            return None
        model = self._engine.model
        ids = torch.tensor([[*self._ids, *plain[:place]]], device=input_device(model))
        logits = model(ids, logits_to_keep=1).logits[0, -1].float()  # rows of a whole vocabulary are large
        return float(logits[plain[place]] - logits[other[place]])


def _arguments(settings: Settings) -> dict[str, Any]:
    """Of `generate`, whatever a model's own defaults are; its repetition penalty, if it has one, stays."""
    if settings.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    neutral: dict[str, Any] = {"top_k": 0, "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    return neutral | {"do_sample": True, "num_beams": 1, "temperature": float(settings.temperature), "top_p": float(settings.top_p)}


def _logprobs(logits: Sequence[torch.Tensor], tokens: Sequence[int], most: int) -> tuple[tuple[float, tuple[tuple[int, float], ...]], ...]:
    """For each token, given `[1, vocab]` before it."""
    found = []
    for row, token in zip(logits, tokens, strict=False):  # on a GPU there may be one row behind the end
        known = torch.log_softmax(row[0].float(), dim=-1)
        best = known.topk(most)
        found.append((float(known[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))))
    return tuple(found)


def _ids(found: Any) -> frozenset[int]:
    """The EOS ids of a generation config: none, one, or several."""
    return frozenset(found if isinstance(found, list | tuple) else [] if found is None else [int(found)])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def load(
    model: str, adapter: str | None = None, dtype: str = "auto", load_in: str | None = None, device: str | None = None,
    packed: bool = False, exact: str | None = None,
) -> Engine:  # fmt: skip
    """An engine from the command's flags, whose meanings are those of `lossless`.

    Raises:
        UsageError: the model or the adapter cannot be loaded, or they do not belong together.
    """
    from lossless.adapter.hub import shipped_adapter

    def loaded() -> Engine:
        base = load_base(model, dtype, load_in, device)
        if packed:
            pack(base.model)
        source = adapter or shipped_adapter(model)
        fast = accelerate(base.model, source, base.tokenizer, exact) if source else None
        info = Info(
            name=_name(model), adapter=(_name(adapter) if adapter else "shipped") if source else "", precision=precision(base.model),
            device=device_name(base.model.device), threads=torch.get_num_threads(), exact=fast.guarantee.level if fast else "",
            context=context_limit(base.model) or _CONTEXT, packed=is_packed(base.model),
        )  # fmt: skip
        kept_bytes = min(_KEPT_BYTES, int(_KEPT_SHARE * free_memory(base.model.device) * 2**30))
        check_tokens(greeting := encode(base.tokenizer, _GREETING), base.model)
        for warmed in (base.model, fast):
            if warmed is not None:  # what is made at a first call is not to be timed in the first answer
                ids = torch.tensor([greeting], device=input_device(base.model))
                warmed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_WARM_TOKENS, do_sample=False)
        return Engine(base.model, base.tokenizer, fast, info, kept_bytes, slot)

    slot = Slot()
    try:
        return slot.call(loaded)
    except BaseException:  # Ctrl-C, too, which does not wait until a model is loaded
        slot.close(ending_s=0)
        raise


def _name(source: str) -> str:
    """Of a folder or a file its own name, not where it lies; a hub id as it is."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source
