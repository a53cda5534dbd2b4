"""Random calls of `generate`: what is asked, of which base, and whether both sides say the same.

Knows: every argument that a caller may give, sensible or not, and how an answer is compared. A case is made of a seed and its
number alone, so that each can be tried again by itself. Does not know: how many there are.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

import lossless
from lossless.adapter.compat import new_adapter
from lossless.base.layers import CACHE
from lossless.errors import UsageError
from lossless.generation.model import AcceleratedModel, accelerate

from ..conformance.families import build
from ..conftest import VOCAB, build_tiny, tiny_config
from ..test_generate import letters as make_letters

BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: build_tiny(seed=5, hidden=64, inner=160),
    "llama, heads of 32": lambda: build_tiny(seed=7, hidden=128, inner=160),  # which the kernels take
    "llama, of 64s": lambda: build_tiny(seed=9, hidden=128, inner=192),  # which exact twins take in every dtype
    "llama, heads of 32, packed": lambda: build_tiny(seed=8, hidden=128, inner=160),
    "llama, eager": lambda: build_tiny(seed=6, attention="eager"),
    "mistral": lambda: build("mistral"),
    "qwen3": lambda: build("qwen3"),
    "gpt2": lambda: build("gpt2"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_APART = 0.25  # logits under near-tie or `off`; under a bound that was measured, as far as that says
_HOME = str(Path(lossless.__file__).parent)


class Broken(RuntimeError):
    """What a caller's own code may raise."""


@functools.cache
def _tokenizer() -> Any:
    """Its tokens are letters, and strings to stop at are made of them."""
    return make_letters()


@functools.cache
def attached(base: str, dtype: str, exact: str, schedule: str) -> AcceleratedModel:
    """A tiny model with an adapter of random numbers, near-tie where bitwise is not to be had."""
    model = BASES[base]().to(DTYPES[dtype])
    if base.endswith("packed"):
        lossless.pack(model)
    adapter = new_adapter(model, tiny_config()).randomize(2, 1.0)
    try:
        return accelerate(model, adapter, exact=exact, schedule=schedule)
    except UsageError:
        return accelerate(model, adapter, exact="near-tie", schedule=schedule)


class Recorder(BaseStreamer):
    """Notes what it is given; may break off."""

    def __init__(self, breaks: Callable[[], None]) -> None:
        self.seen: list[Any] = []
        self.breaks = breaks

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())
        self.breaks()

    def end(self) -> None:
        self.seen.append("end")


class Lengths(StoppingCriteria):
    """Notes the texts that it is asked about; stops at one; may break off."""

    def __init__(self, breaks: Callable[[], None], stops: int | None) -> None:
        self.seen: list[Any] = []
        self.breaks, self.stops = breaks, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        self.breaks()
        ends = len(self.seen) == self.stops
        return torch.full((len(input_ids),), ends, dtype=torch.bool)


class Tilt(LogitsProcessor):
    """A processor without a memory, which looks at the whole text; may break off."""

    def __init__(self, longest: int, error: type[BaseException] | None) -> None:
        self.longest, self.error = longest, error  # no matter how often it is asked about a position

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.error is not None and input_ids.shape[1] >= self.longest:
            raise self.error("from the caller's own code")
        turn = input_ids.sum(1, keepdim=True) % 7
        return scores + 0.5 * torch.cos(torch.arange(scores.shape[1]) * (1 + turn))


class Advancing(LogitsProcessor):
    """A processor that moves on with each call, as a grammar's matcher does."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        return scores.roll(len(self.seen) % 3, dims=-1)


@dataclass
class Case:
    """One call. `options` are made anew for each side, for some of them remember."""

    number: str
    base: str
    dtype: str
    exact: str
    schedule: str
    ids: torch.Tensor
    options: Callable[[AcceleratedModel], tuple[dict[str, Any], list[Any]]]
    what: list[str]
    draws: int
    cut_at: int | None  # the call of a function of the package, counted from the beginning, at which Ctrl-C comes

    def __str__(self) -> str:
        cut = f", Ctrl-C at {self.cut_at}" if self.cut_at else ""
        return f"case {self.number} ({self.base}, {self.dtype}, {self.exact}, {self.schedule}, {tuple(self.ids.shape)}, {', '.join(self.what)}{cut})"


_SAMPLING: dict[str, list[Any]] = {
    "temperature": [0.3, 0.7, 1.0, 1.5], "top_k": [1, 5, 40, 0], "top_p": [0.5, 0.9, 1.0], "min_p": [0.05, 0.3],
    "typical_p": [0.5, 0.95], "epsilon_cutoff": [0.01], "eta_cutoff": [0.01], "top_h": [0.4],
}  # fmt: skip
_ANY: dict[str, list[Any]] = {
    "repetition_penalty": [1.2, 0.8], "no_repeat_ngram_size": [2, 3], "bad_words_ids": [[[5], [6, 7]]],
    "suppress_tokens": [[4, 5, 6]], "begin_suppress_tokens": [[8, 9]], "forced_bos_token_id": [4], "forced_eos_token_id": [9],
    "exponential_decay_length_penalty": [(3, 1.3)], "sequence_bias": [[[[7], 3.0], [[8, 9], -4.0]]], "min_length": [12, 30],
    "min_new_tokens": [3, 9], "renormalize_logits": [True], "remove_invalid_values": [True], "eos_token_id": [7, [7, 8, 9, 30], 200],
    "pad_token_id": [0, 2], "return_dict_in_generate": [True], "use_cache": [True, False],
    "num_return_sequences": [2, 3], "max_length": [12, 40], "encoder_repetition_penalty": [1.3], "encoder_no_repeat_ngram_size": [2],
    "prompt_lookup_num_tokens": [3], "num_beams": [2, 3], "guidance_scale": [1.0, 1.5],
}  # fmt: skip
_SENSELESS: dict[str, list[Any]] = {
    "temperature": [0.0, -1.0, "hot"], "top_k": [-3, 1.5], "top_p": [1.7, None], "min_p": [2.0], "repetition_penalty": [-1.0, 0],
    "bad_words_ids": [[[]], "x"], "num_return_sequences": [0, 2.5], "max_new_tokens": [-4, 0, 2.5, "many"], "nonsense": [1], "eos_token_id": ["</s>", -1],
    "attention_mask": [torch.ones(7, 2), "mask"], "num_beams": [0], "stopping_criteria": [3], "logits_processor": [3], "stop_strings": ["without a tokenizer"],
}  # fmt: skip


def make(seed: int, number: int) -> Case:
    """Case `number` of this seed."""
    rng = random.Random(f"{seed}/{number}")
    base, dtype = rng.choice(list(BASES)), rng.choice(list(DTYPES))
    exact, schedule = rng.choice(("bitwise", "near-tie")), rng.choice(("parallel", "deferred"))
    # texts of a batch are drafted for without a guarantee below float32, and that is documented
    batch = rng.choice((2, 3, 4)) if dtype == "float32" and rng.random() < 0.3 else 1
    width = rng.choice((1, 2, rng.randint(3, 40), rng.randint(3, 40), rng.randint(100, 200)))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    ids = torch.randint(3, VOCAB, (batch, width), generator=generator)
    if rng.random() < 0.2:  # a text that repeats itself
        ids = ids[:, : 1 + width // 4].repeat(1, 4)[:, :width]
    fixed: dict[str, Any] = {"max_new_tokens": rng.choice((1, 2, rng.randint(3, 40), rng.randint(3, 40))), "do_sample": rng.random() < 0.5}
    for name in rng.sample(list(_SAMPLING), rng.choice((0, 0, 1, 2)) if fixed["do_sample"] else rng.choice((0, 0, 0, 1))):
        fixed[name] = rng.choice(_SAMPLING[name])
    for name in rng.sample(list(_ANY), rng.choice((0, 0, 1, 1, 2, 3))):
        fixed[name] = rng.choice(_ANY[name])
    if fixed.get("return_dict_in_generate"):
        fixed |= {"output_scores": rng.random() < 0.5, "output_logits": rng.random() < 0.5}
    if batch > 1 and "num_return_sequences" in fixed and not fixed["do_sample"]:
        del fixed["num_return_sequences"]
    if dtype != "float32":
        fixed.pop("num_return_sequences", None)  # a batch, too
    mask = _mask(rng, batch, width)
    if mask is not None:
        fixed["attention_mask"] = mask
    if rng.random() < 0.08:
        name = rng.choice(list(_SENSELESS))
        fixed[name] = rng.choice(_SENSELESS[name])
    kinds = [kind for kind in ("streamer", "criterion", "processor", "allowed", "stop", "advancing", "cache", "embeds") if rng.random() < 0.1]
    breaks_at = rng.randint(1, 25) if rng.random() < 0.3 else None
    error = rng.choice((Broken, KeyboardInterrupt))
    stops = rng.choice((None, None, 4, 11))
    allowed = [rng.sample(range(3, VOCAB), rng.randint(1, 12)) for _ in range(5)]
    letters = [chr(rng.randrange(33, 127)) for _ in range(3)]

    def options(fast: AcceleratedModel) -> tuple[dict[str, Any], list[Any]]:
        calls, given, witnesses = iter(range(breaks_at or 0)), dict(fixed), []

        def breaks() -> None:
            if breaks_at is not None and next(calls, None) is None:
                raise error("from the caller's own code")

        if "streamer" in kinds:
            witnesses.append(streamer := Recorder(breaks))
            given["streamer"] = streamer
        if "criterion" in kinds:
            witnesses.append(criterion := Lengths(breaks, stops))
            given["stopping_criteria"] = StoppingCriteriaList([criterion])
        processors: list[Any] = [Tilt(width + (breaks_at or 0), error if breaks_at else None)] if "processor" in kinds else []
        if "advancing" in kinds:
            witnesses.append(advancing := Advancing())
            processors.append(advancing)
        if processors:
            given["logits_processor"] = LogitsProcessorList(processors)
        if "allowed" in kinds:
            given["prefix_allowed_tokens_fn"] = lambda row, text: allowed[(int(text[-1]) + row) % 5]
        if "stop" in kinds:
            given |= {"stop_strings": letters, "tokenizer": _tokenizer()}
        if "cache" in kinds and batch == 1 and width > 2 and mask is None:
            given[CACHE] = cache = DynamicCache(config=fast.base.config)
            with torch.no_grad():
                fast.base(ids[:, : width // 2], **{CACHE: cache}, use_cache=True)
        if "embeds" in kinds and CACHE not in given:
            given["inputs_embeds"] = fast.base.get_input_embeddings()(ids)
        return given, witnesses

    cut_at = rng.choice((rng.randint(1, 200), rng.randint(1, 2000))) if rng.random() < 0.2 else None
    what = [f"{key}={value}" for key, value in fixed.items() if not isinstance(value, torch.Tensor)] + kinds
    if mask is not None:
        what.append("mask" if mask.all() else f"mask {mask.tolist()}" if width < 8 else "padded")
    if breaks_at and {"streamer", "criterion", "processor"} & set(kinds):
        what.append(f"{error.__name__} at {breaks_at}")
    return Case(f"{seed}/{number}", base, dtype, exact, schedule, ids, options, what, rng.randrange(2**31), cut_at)


def _mask(rng: random.Random, batch: int, width: int) -> torch.Tensor | None:
    """None, all ones, padded on the left, or with holes."""
    kind = rng.choice(("none", "ones", "ones", "left", "holes") if rng.random() < 0.6 else ("ones",))
    if kind == "none":
        return None
    mask = torch.ones(batch, width, dtype=torch.long)
    if kind == "left":
        for row in mask:
            row[: rng.randint(0, width - 1)] = 0
    elif kind == "holes" and width > 2:
        mask[:, rng.randint(1, width - 2)] = 0
    return mask


def try_case(case: Case) -> tuple[str, str | None]:
    """Both sides of a case: its outcome in a word, and what is wrong, if anything is."""
    fast = attached(case.base, case.dtype, case.exact, case.schedule)
    if case.cut_at:
        given, _ = case.options(fast)
        cut = _interrupt(fast, case, given)
    expected, found = (_answer(model, case, fast) for model in (fast.base, fast))
    if len(case.ids) > 1 and "raised" in expected and "raised" in found:  # texts of a batch are chosen for alone, and a message may say their shape
        expected, found = (said | {"raised": str(said["raised"]).partition("(")[0]} for said in (expected, found))
    for part, ours in found.items():
        apart = 0.0 if fast.stats.exact == "bitwise" or part not in ("scores", "logits") else max(_APART, fast.guarantee.noise)
        if not _same(expected.get(part), ours, apart):
            return "failed", f"{part}: {_short(ours)}, the base's own: {_short(expected.get(part, expected.get('raised')))}"
    if "raised" in found:
        return f"raised {'by the caller' if 'own code' in str(found['raised']) else 'by the base, as by itself'}", None
    if case.cut_at:
        return "exact after Ctrl-C" if cut else "exact, done before Ctrl-C", None
    return "exact" if fast.stats.served else "exact, handed to the base", None


def _answer(model: Any, case: Case, fast: AcceleratedModel) -> dict[str, Any]:
    """Everything that a caller can see of a call."""
    given, witnesses = case.options(fast)
    ids = () if "inputs_embeds" in given else (case.ids,)
    torch.manual_seed(case.draws)
    seen: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = model.generate(*ids, **given)
        except BaseException as error:  # Ctrl-C of the caller's own code among them
            seen["raised"] = f"{type(error).__name__}: {error}"
        else:
            if isinstance(out, torch.Tensor):
                seen["tokens"] = out
            else:
                seen |= {"tokens": out.sequences, "scores": out.scores, "logits": getattr(out, "logits", None)}
            seen["generator"] = torch.random.get_rng_state()
            if (past := given.get(CACHE)) is not None:
                seen["cache"] = past.get_seq_length()
    seen["witnesses"] = [witness.seen for witness in witnesses]
    return seen


def _interrupt(fast: AcceleratedModel, case: Case, given: dict[str, Any]) -> bool:
    """Ctrl-C when so many functions of the package have been called; whether it came before the end."""
    left = case.cut_at or 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        # a generator that is thrown away is entered once more, and Python drops whatever is raised there
        if frame.f_code.co_filename.startswith(_HOME) and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    ids = () if "inputs_embeds" in given else (case.ids,)
    before = sys.gettrace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.settrace(watch)
        try:
            fast.generate(*ids, **given)
        except BaseException:  # whatever else the call would have raised: what is looked at is the next one
            pass
        finally:
            sys.settrace(before)
    return left <= 0


def _same(a: Any, b: Any, apart: float) -> bool:
    """apart: how far from each other numbers may be; 0: nowhere."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape:
            return False
        if not apart:
            return torch.equal(a, b)
        both = a.isfinite() & b.isfinite()  # what a processor cuts off may hang on little, and changes no token
        return torch.allclose(a[both], b[both], rtol=0.1, atol=apart)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y, apart) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _short(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, torch.Tensor) and value.numel() < 300 else value)
    return text if len(text) < 300 else f"{text[:300]}..."
