"""What is told of each step: which tokens, when, and where their drafts came from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.drafting.builder import TreeBuilder
from lossless.drafting.ngram import NGramCache
from lossless.generation.model import AcceleratedModel, accelerate

from .conftest import build_tiny, prompt_ids, tiny_config


@pytest.mark.parametrize("exact", ["near-tie", "off"])
def test_steps_add_up_to_the_answer(exact: str) -> None:
    tiny = build_tiny()
    fast = accelerate(tiny, new_adapter(tiny, tiny_config()).randomize(1), exact=exact, adaptive=False)
    prompt = prompt_ids()
    answer = fast.generate(prompt, max_new_tokens=60)[0, prompt.shape[1] :].tolist()
    first, *others = fast.stats.steps
    assert [token for step in fast.stats.steps for token in step.tokens] == answer
    assert (first.sources, first.drafted) == ((0,), 0)
    assert sum(step.drafted for step in others) == fast.stats.drafted > 0
    assert len(others) == fast.stats.target_passes or exact == "near-tie"
    times = [step.at_s for step in fast.stats.steps]
    assert times == sorted(times)
    assert times[0] > 0
    for step in others:
        assert step.sources[-1] == 0 or exact == "near-tie"
        assert all(source in (-1, depth) for depth, source in enumerate(step.sources[:-1], start=1))


def test_an_accepted_token_of_the_text_itself_is_told_from_one_of_a_stream(fast: AcceleratedModel) -> None:
    fast.drafting = replace(fast.drafting, adaptive=False)
    prompt = prompt_ids(5).repeat(1, 8)
    fast.generate(prompt, max_new_tokens=80)
    assert any(source == -1 for step in fast.stats.steps for source in step.sources)
    fast.drafting = replace(fast.drafting, recall=False)
    fast.generate(prompt, max_new_tokens=80)
    assert all(source >= 0 for step in fast.stats.steps for source in step.sources)


def test_texts_of_a_batch_have_steps_of_their_own(fast: AcceleratedModel) -> None:
    prompts = torch.cat([prompt_ids(seed=3), prompt_ids(seed=4)])
    answers = fast.generate(prompts, max_new_tokens=20)[:, prompts.shape[1] :].tolist()
    for number, answer in enumerate(answers):
        assert [token for step in fast.stats.steps if step.text == number for token in step.tokens] == answer


def test_a_node_is_the_texts_own_if_the_text_gave_it_more() -> None:
    memory = NGramCache([5, 6, 7, 9, 6])  # after 6 came 7: trusted by a sixth
    for stream, recalled in [(0.1, True), (0.9, False)]:
        builder = TreeBuilder(2, memory, 1, None)
        builder.grow([{7: math.log(stream), 8: math.log(0.05)}])
        tree = builder.finish(6)
        assert tree.tokens == (6, 7)
        assert tree.sources == (0, -1 if recalled else 1)
