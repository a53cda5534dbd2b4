"""Processors and criteria that remember: asked once about each emitted position, in order, at every level of exactness."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from lossless.adapter.compat import new_adapter
from lossless.generation.model import AcceleratedModel, accelerate

from .conftest import VOCAB, build_tiny, prompt_ids, tiny_config
from .test_generate import letters
from .test_lossless import Bushy, both

LEVELS = ("bitwise", "near-tie", "off")
CLOSE = 1.0  # logits that a choice may be off by, many times the real noise: most choices are too close to call


class Counter(LogitsProcessor):
    """Shifts by how often it was asked, and notes what about."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked.append(ids[0].tolist())
        return scores.roll(len(self.asked) % 3, dims=-1)


class Watermark(LogitsProcessor):
    """Favours a half of the vocabulary that follows from the last, wherever the text is."""

    def __init__(self) -> None:
        self.state, self.asked = 17, list[list[int]]()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked.append(ids[0].tolist())
        self.state = (self.state * 1103515245 + 12345) % 2**31
        favoured = torch.rand(VOCAB, generator=torch.Generator().manual_seed(self.state)) < 0.5
        return scores + 2.0 * favoured


class Grammar(LogitsProcessor):
    """llguidance's matcher, which goes on by the last token with each call, as grammar libraries have it."""

    def __init__(self, pattern: str = r"([a-c]+[0-9]{2}[-+])*") -> None:
        guidance = pytest.importorskip("llguidance", reason="the grammar library of the test extra")
        hf = pytest.importorskip("llguidance.hf")
        tokenizer = letters()
        tokenizer.add_special_tokens({"eos_token": "<eos>"})
        self.matcher = guidance.LLMatcher(hf.from_tokenizer(tokenizer, n_vocab=VOCAB), guidance.LLMatcher.grammar_from_regex(pattern))
        self.asked: list[list[int]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.asked:
            assert self.matcher.consume_token(int(ids[0, -1])), self.matcher.get_error()
        self.asked.append(ids[0].tolist())
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8) & 1).flatten()[:VOCAB].bool()
        return scores.masked_fill(~allowed, -torch.inf)


class Twentieth(StoppingCriteria):
    """Ends the text when it was asked for the twentieth time."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.asked.append(ids[0].tolist())
        return torch.tensor([len(self.asked) == 20])


def attached(level: str) -> AcceleratedModel:
    model = build_tiny(seed=5, hidden=64, inner=160)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact=level, adaptive=False)
    if level == "near-tie":
        fast.attached.guarantee = replace(fast.guarantee, noise=CLOSE)
    return fast


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", [Counter, Watermark, Grammar])
def test_a_processor_that_remembers(kind: Callable[[], Any], do_sample: bool, level: str) -> None:
    fast, asked, said = attached(level), [], []
    for speaker in (fast.base, fast):
        processor, criterion = kind(), Twentieth()
        more = {"logits_processor": [processor], "stopping_criteria": [criterion], "do_sample": do_sample, "max_new_tokens": 40}
        served = speaker is fast.base or level != "near-tie"
        if speaker is fast and served:
            fast.attached.drafter = Bushy(said[0])  # so that a pass emits several tokens
        torch.manual_seed(3)
        with contextlib.nullcontext() if served else pytest.warns(UserWarning, match=f"{kind.__name__}, a processor that may remember"):
            out = speaker.generate(prompt_ids(), attention_mask=torch.ones(1, 7), **more)
        said.append(out[0, 7:].tolist())
        asked.append((processor.asked, criterion.asked, torch.random.get_rng_state().tolist()))
    assert said[0] == said[1]
    assert asked[0] == asked[1]
    assert [len(text) for text in asked[1][0]] == list(range(7, 27))
    assert fast.stats.served == (level != "near-tie")
    if fast.stats.served:
        assert fast.stats.target_passes < 10


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_function_that_says_what_is_allowed(do_sample: bool, level: str) -> None:
    """HF's processor around it is asked again where a choice is close; the function is not."""
    fast, asked = attached(level), []

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        asked[-1].append(ids.tolist())
        return [3 + (int(ids[-1]) + len(asked[-1]) * k) % 80 for k in (1, 2, 3, 5, 8, 13)]

    stops = []

    def given() -> dict[str, Any]:
        asked.append([])
        stops.append(Twentieth())
        return {"prefix_allowed_tokens_fn": allowed, "stopping_criteria": [stops[-1]], "do_sample": do_sample, "max_new_tokens": 40}

    said = []
    for speaker in (fast.base, fast):
        torch.manual_seed(3)
        said.append(speaker.generate(prompt_ids(), attention_mask=torch.ones(1, 7), **given()))
    assert torch.equal(*said)
    assert asked[0] == asked[1]
    assert stops[0].asked == stops[1].asked
    assert len(asked[1]) == 20
    assert fast.stats.served
    assert (fast.stats.reread > 0) == (level == "near-tie")


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_hf_s_own_processors_may_be_asked_again_where_choices_are_close(do_sample: bool) -> None:
    fast = attached("near-tie")
    more = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "sequence_bias": {(10,): 4.0}, "suppress_tokens": [9], "do_sample": do_sample}
    expected, found = both(fast, prompt_ids(), 1, **more, **({"top_k": 20, "top_p": 0.9} if do_sample else {}))
    assert torch.equal(expected, found)
    assert fast.stats.served
    assert fast.stats.reread > 5


def test_criteria_and_streamers_that_remember_are_served_where_choices_are_close() -> None:
    fast, stops = attached("near-tie"), []
    for speaker in (fast.base, fast):
        stops.append(Twentieth())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            speaker.generate(prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=40, do_sample=False, stopping_criteria=[stops[-1]])
    assert stops[0].asked == stops[1].asked
    assert fast.stats.served
    assert fast.stats.reread > 5


def test_a_padded_prompt_has_near_tie_at_most_and_so_the_base_answers() -> None:
    fast, asked = attached("bitwise"), []
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    for speaker in (fast.base, fast):
        processor = Counter()
        with contextlib.nullcontext() if speaker is fast.base else pytest.warns(UserWarning, match="Counter, a processor that may remember"):
            out = speaker.generate(prompt_ids(), attention_mask=mask, max_new_tokens=12, do_sample=False, logits_processor=[processor])
        asked.append((out.tolist(), processor.asked))
    assert asked[0] == asked[1]
