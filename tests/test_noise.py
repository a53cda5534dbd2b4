"""Foreseen dice are the dice that fall, and drafts make use of them."""

from __future__ import annotations

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.drafting import noise as module
from lossless.drafting.noise import NoiseBias, NoiseTape
from lossless.generation.model import AcceleratedModel, accelerate

from .conftest import VOCAB, build_tiny, prompt_ids, tiny_config


def test_what_is_foreseen_is_what_is_drawn() -> None:
    like, tape = torch.empty(1, VOCAB), NoiseTape(2)
    torch.manual_seed(5)
    tape.at(1, like)
    tape.go_on(1)  # text 1 is a position ahead of text 0
    state = torch.random.get_rng_state()
    foreseen = tape.peek([0, 1], 3, like)  # [texts, 3, vocab]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(tape.peek([1], 3, like)[0], foreseen[1])
    for ahead in range(3):
        for text in (0, 1):
            assert torch.equal(tape.at(text, like), foreseen[text, ahead])
            tape.go_on(text)


@pytest.mark.parametrize("between", [False, True], ids=["undisturbed", "another draws too"])
def test_foreseeing_changes_no_draw(between: bool) -> None:
    like = torch.empty(1, VOCAB)

    def drawn(foreseeing: int) -> list[torch.Tensor]:
        torch.manual_seed(5)
        tape, found = NoiseTape(1), []
        for position in range(8):
            if foreseeing:
                found_ahead = tape.peek([0], foreseeing, like)[0, 0]
            if between and position % 3 == 1:  # a processor, say; what was foreseen before will not come
                torch.rand(2)
            found.append(tape.at(0, like))
            if foreseeing and not (between and position % 3 == 1):
                assert torch.equal(found[-1], found_ahead)
            tape.go_on(0)
        return [*found, torch.random.get_rng_state()]

    plain = drawn(0)
    for foreseeing in (1, 4):
        assert all(map(torch.equal, plain, drawn(foreseeing)))


def test_no_noise_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made, noise = [], NoiseTape._noise
    monkeypatch.setattr(NoiseTape, "_noise", lambda tape, like: made.append(1) or noise(tape, like))
    tape = NoiseTape(1)
    for _ in range(6):
        tape.peek([0], 4, torch.empty(1, VOCAB))
        for _ in range(2):
            tape.at(0, torch.empty(1, VOCAB))
            tape.go_on(0)
    assert len(made) == 6 * 2 + 2


def test_drafts_that_are_right_foresee_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRUST", 1.0)
    logits, owner = torch.randn(6, VOCAB) * 2, torch.tensor([0, 0, 1, 1, 2, 2])
    noise = torch.empty(3, 2, VOCAB).exponential_(1)
    for temperature, top_k in ((0.7, 0), (1.3, 0), (1.0, 5), (1.0, VOCAB + 1)):
        thrown = NoiseBias(noise, temperature, top_k).perturb(logits, owner, 1, None)
        kept = logits
        if top_k == 5:
            kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf)
        choices = (torch.softmax(kept / temperature, -1) / noise[owner, 1]).argmax(-1)
        assert torch.equal(thrown.argmax(-1), choices)
    ids = torch.tensor([3, 8, 40, 41])
    some = NoiseBias(noise, 1.0, 0).perturb(logits[:, ids], owner, 1, ids)
    torch.testing.assert_close(some, NoiseBias(noise, 1.0, 0).perturb(logits, owner, 1, None)[:, ids])


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_of_the_few_that_can_be_chosen_the_best_are_those_of_all(temperature: float) -> None:
    logits, owner, noise = torch.randn(6, VOCAB) * 2, torch.tensor([0, 0, 1, 1, 2, 2]), torch.empty(3, 2, VOCAB).exponential_(1)
    bias = NoiseBias(noise, temperature, 5)
    expected = bias.perturb(logits, owner, 1, None).log_softmax(-1).topk(3)
    few = logits.topk(bias.cut)
    tokens, scores = bias.best(few.indices, few.values - 7, owner, 1, 3)
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(scores, expected.values)
    assert NoiseBias(noise, temperature, 0).cut == NoiseBias(noise, temperature, 10_000).cut == 0


def test_drafts_that_are_nearly_right_hold_the_choice_more_often() -> None:
    torch.manual_seed(0)
    logits = torch.randn(500, VOCAB) * 2
    drafted, noise = logits + 0.7 * torch.randn_like(logits), torch.empty(500, 1, VOCAB).exponential_(1)
    choices = (torch.softmax(logits, -1) / noise[:, 0]).argmax(-1, keepdim=True)

    def held(ranked: torch.Tensor) -> int:
        return int((ranked.topk(3).indices == choices).sum())

    blind = held(drafted)
    assert held(NoiseBias(noise, 1.0, 0).perturb(drafted, torch.arange(500), 0, None)) > 1.5 * blind > 100


@pytest.mark.parametrize("texts", [1, 3])
def test_each_node_has_the_dice_of_its_own_text_and_depth(texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every token is as likely as any other, the dice alone decide, and drafts that trust them are never wrong."""
    monkeypatch.setattr(module, "_TRUST", 50.0)
    model = build_tiny(seed=0)
    fast = accelerate(model, new_adapter(model, tiny_config()), exact="off", recall=False, adaptive=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    ids = torch.cat([prompt_ids(6, seed) for seed in range(texts)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 31, "do_sample": True, "top_k": 0, "eos_token_id": None}
    torch.manual_seed(1)
    expected = model.generate(ids, **options)
    torch.manual_seed(1)
    assert torch.equal(fast.generate(ids, **options), expected)
    assert fast.stats.acceptance_length == 1 + fast.adapter.config.num_streams


def test_lucky_nodes_are_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens that are all as likely the early exit keeps those on which the dice fall, and without dice none."""
    monkeypatch.setattr(module, "_TRUST", 50.0)
    model = build_tiny(seed=0)
    adapter = new_adapter(model, tiny_config(pruning_rank=4, schedule="parallel"))
    fast = accelerate(model, adapter, exact="off", recall=False, adaptive=False, pruning_floor=0.5)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    options = {"max_new_tokens": 31, "do_sample": True, "top_k": 0, "eos_token_id": None}
    ids = torch.cat([prompt_ids(6, seed) for seed in range(2)])
    real, found = type(fast.drafter).worth_streams, []
    for known in (True, False):
        monkeypatch.setattr(type(fast.drafter), "worth_streams", real if known else lambda *given: real(*given[:-1]))
        torch.manual_seed(1)
        fast.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append((fast.stats.pruned_wrongly, fast.stats.acceptance_length))
    assert found[0] == (0, 1 + fast.adapter.config.num_streams)
    assert found[1][0] > 0


def test_greedy_decoding_has_no_dice(fast: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(fast.drafter, "trees", lambda *given: seen.append(given[4]) or type(fast.drafter).trees(fast.drafter, *given))
    ids = prompt_ids(5)
    for sampled in (False, True):
        fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=sampled)
        assert {dice is not None for dice in seen} == {sampled}
        seen.clear()
