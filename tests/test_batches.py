"""Batches: every text is the one that HF's own batch would hold, from the same seed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from lossless.adapter.compat import new_adapter
from lossless.drafting.noise import NoiseTape
from lossless.generation.exactness import Guarantee
from lossless.generation.model import AcceleratedModel, accelerate

from .conformance.families import build
from .conftest import VOCAB, build_tiny, prompt_ids, tiny_config
from .test_lossless import both


def padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `[batch, longest]`, padded on the left, and their mask."""
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, max(lengths) - length :] = prompt_ids(length, seed=row)[0]
        mask[row, max(lengths) - length :] = 1
    return ids, mask


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(5, 9, 3), (6, 6), (4,), (2, 8, 8, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 20}, {"do_sample": True, "temperature": 0.8, "repetition_penalty": 1.2}],
    ids=["greedy", "sampled", "penalty"],
)
def test_the_same_batch(schedule: str, attention: str, lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    model = build_tiny(seed=5, attention=attention)
    fast = accelerate(model, new_adapter(model, tiny_config(schedule=schedule)).randomize(2))
    ids, mask = padded(*lengths)
    expected, found = both(fast, ids, seed=7, attention_mask=mask, max_new_tokens=32, **options)
    assert torch.equal(expected, found)
    assert fast.stats.served
    assert (fast.stats.texts, fast.stats.tokens) == (len(lengths), 32 * len(lengths))


@pytest.mark.parametrize("do_sample", [False, True])
def test_texts_that_end_at_different_times(fast: AcceleratedModel, do_sample: bool) -> None:
    ids, mask = padded(5, 9, 3, 7)
    torch.manual_seed(3)
    plain = fast.base.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=do_sample)[:, 9:]
    ends = [int(plain[0, 4]), int(plain[1, 11]), int(plain[2, 20])]
    expected, found = both(fast, ids, seed=3, attention_mask=mask, do_sample=do_sample, eos_token_id=ends)
    assert torch.equal(expected, found)
    lengths = (found[:, 9:] != 0).sum(1)
    assert len(set(lengths.tolist())) >= 2
    assert fast.stats.tokens == int(lengths.sum())


def test_a_batch_of_drafts_that_are_accepted(fast: AcceleratedModel) -> None:
    """Each text follows a litany of its own, so that each accepts other rows of other trees."""

    def litany(text: int, ids: torch.Tensor) -> list[int]:
        return [10 + (int(ids[-1]) + text) % (7 + text)]

    ids, mask = padded(5, 9, 3)
    expected, found = both(fast, ids, attention_mask=mask, max_new_tokens=90, prefix_allowed_tokens_fn=litany)
    assert torch.equal(expected, found)
    assert len({tuple(row[-20:]) for row in found.tolist()}) == 3
    assert fast.stats.acceptance_length > 3


@pytest.mark.parametrize("copies", [2, 4])
def test_several_answers_to_one_prompt(fast: AcceleratedModel, copies: int) -> None:
    ids, mask = padded(5, 9)
    options = {"do_sample": True, "num_return_sequences": copies, "attention_mask": mask}
    expected, found = both(fast, ids, seed=4, **options)
    assert torch.equal(expected, found)
    assert found.shape[0] == 2 * copies
    assert fast.stats.served


def test_padding_that_hf_infers_from_the_prompt(fast: AcceleratedModel) -> None:
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt_ids()], dim=1)
    expected, found = both(fast, ids, attention_mask=None)
    assert torch.equal(expected, found)
    assert fast.stats.served


class Nudge(LogitsProcessor):
    """Depends on the whole batch: it favours what the other rows find unlikely."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 0.5 * scores.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"logits_processor": LogitsProcessorList([Nudge()])}, "Nudge for a batch"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate for a batch"),
        ({"encoder_repetition_penalty": 1.3}, "EncoderRepetitionPenaltyLogitsProcessor for a batch"),
    ],
)
def test_what_a_batch_cannot_have_is_answered_by_the_base(
    fast: AcceleratedModel, options: dict[str, Any], reason: str
) -> None:
    ids, mask = padded(5, 9)
    with pytest.warns(UserWarning, match=reason):
        expected, found = both(fast, ids, attention_mask=mask, do_sample=True, **options)
    sequences = [x if isinstance(x, torch.Tensor) else x.sequences for x in (expected, found)]
    assert torch.equal(*sequences)
    assert not fast.stats.served


def test_a_tape_holds_what_multinomial_would_draw() -> None:
    probabilities = torch.softmax(torch.randn(3, VOCAB), dim=-1)
    torch.manual_seed(2)
    expected = [torch.multinomial(probabilities, 1)[:, 0] for _ in range(4)]
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    tape, found = NoiseTape(3), torch.zeros(4, 3, dtype=torch.long)
    for text, position in [(1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (2, 2), (2, 3), (1, 2), (0, 1), (0, 2), (1, 3), (0, 3)]:
        noise = tape.at(text, probabilities[text : text + 1])
        tape.go_on(text)
        found[position, text] = (probabilities[text] / noise).argmax()
    assert torch.equal(found, torch.stack(expected))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not tape._draws  # what every text has passed is forgotten


@pytest.mark.parametrize("exact", ["bitwise", "near-tie"])
def test_a_padded_prompt_behind_a_window_is_answered_by_the_base(exact: str) -> None:
    """Its rows see masked keys: how many there are rounds them, and the base's own cache keeps others than ours."""
    model = build("mistral").bfloat16()  # a window of 12
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact=exact, adaptive=False)
    for width, more, served in ((8, 4, True), (14, 30, False)):  # 6 tokens of text in so many columns
        ids, mask = padded(width, 6)
        options = {"attention_mask": mask[1:], "max_new_tokens": more, "do_sample": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="not accelerated: a padded prompt for a base whose layers look back over a window")
            expected, found = both(fast, ids[1:], 3, **options)
        assert torch.equal(expected, found)
        assert fast.stats.served == served


@pytest.mark.filterwarnings("ignore:not accelerated. several answers to a prompt under")
def test_several_answers_to_a_prompt_are_asked_about_as_transformers_asks(fast: AcceleratedModel) -> None:
    """From 5.24 on a function is told the number of the prompt, before that of the answer."""
    asked: list[int] = []

    def allowed(number: int, text: torch.Tensor) -> list[int]:
        asked.append(number)
        return [5 + 20 * number + int(text[-1]) % 7 + i for i in range(12)]

    numbers = []
    for by in (fast.base, fast):
        torch.manual_seed(3)
        asked.clear()
        options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed}
        numbers.append((by.generate(prompt_ids(), **options), set(asked)))
    assert torch.equal(numbers[0][0], numbers[1][0])
    assert numbers[0][1] == numbers[1][1]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("noise", [5.0, 0.0])
def test_a_batch_with_two_tokens_nearly_tied_is_the_base_s_own_answer(noise: float, do_sample: bool, fast: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guarantee, "of_batches", noise)
    ids, mask = padded(5, 9, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = both(fast, ids, seed=3, attention_mask=mask, do_sample=do_sample, max_new_tokens=20)
    assert torch.equal(expected, found)
    assert fast.stats.served == (noise == 0.0)
    assert ("nearly tied" in fast.stats.why) == (noise > 0.0)


@pytest.mark.parametrize("noise", [0.5, 0.0])
def test_what_a_batch_allows_is_asked_once_even_if_it_is_answered_again(noise: float, fast: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guarantee, "of_batches", noise)
    ids, asked = torch.cat([prompt_ids(6, seed=row) for row in range(3)]), list[tuple[int, int]]()

    def allowed(number: int, text: torch.Tensor) -> list[int]:
        asked.append((number, len(text)))
        return [5 + 20 * number + int(text[-1]) % 7 + i for i in range(12)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fast.base.generate(ids, max_new_tokens=20, prefix_allowed_tokens_fn=allowed)
        theirs, asked = sorted(asked), []
        found = fast.generate(ids, max_new_tokens=20, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(expected, found)
    assert fast.stats.served == (noise == 0.0)
    assert sorted(asked) == theirs
