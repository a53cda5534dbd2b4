"""Properties over random trees, prompts, vocabularies and patterns of acceptance."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lossless.adapter.compat import new_adapter
from lossless.base.loading import freeze
from lossless.drafting.drafter import Drafter
from lossless.drafting.tree import DraftTree
from lossless.generation.acceptance import accept
from lossless.generation.model import accelerate

from .conftest import tiny_config
from .test_lossless import both


def random_tree(root: int, vocab: int, luck: random.Random, right: list[int], chance: float) -> DraftTree:
    """Up to 24 nodes; each level holds the right token with this chance, at a random place among wrong ones."""
    tokens, parents = [root], [-1]
    on_path: int | None = 0
    frontier = [0]
    for level in range(luck.randint(0, 5)):
        fresh: list[int] = []
        next_on_path = None
        for node in frontier:
            drafted = luck.sample(range(vocab), k=min(vocab, luck.randint(0, 3)))
            if node == on_path and level < len(right) and luck.random() < chance and right[level] not in drafted:
                drafted.insert(luck.randint(0, len(drafted)), right[level])
            for token in drafted:
                if len(tokens) < 24:
                    tokens.append(token)
                    parents.append(node)
                    fresh.append(len(tokens) - 1)
                    if node == on_path and level < len(right) and token == right[level]:
                        next_on_path = len(tokens) - 1
        frontier, on_path = fresh, next_on_path
    return DraftTree(tuple(tokens), tuple(parents))


@given(st.integers(2, 40), st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 0.5), st.integers(1, 40))
def test_walks_emit_exactly_what_plain_decoding_would(
    vocab: int, seed: int, chance: float, doubt: float, length: int
) -> None:
    def base(text: tuple[int, ...]) -> int:
        return random.Random(hash((text, seed))).randrange(vocab)

    plain: list[int] = [1]
    while len(plain) <= length:
        plain.append(base(tuple(plain)))

    luck, text, unsure = random.Random(seed), [1], False
    while len(text) <= length:
        tree = random_tree(text[-1], vocab, luck, plain[len(text) :], chance) if not unsure else DraftTree((text[-1],), (-1,))
        grown = list(text)
        was_unsure = unsure

        def choose(node: int, tree: DraftTree = tree, grown: list[int] = grown, sure: bool = was_unsure) -> tuple[int, bool] | None:
            assert grown[-1] == tree.tokens[node]  # asked in the order of the text, each position once
            if not sure and luck.random() < doubt:
                return None
            grown.append(base(tuple(grown)))
            return grown[-1], len(grown) > length

        accepted = accept(tree, choose)
        text += accepted.tokens
        assert text == grown == plain[: len(text)]
        assert len(accepted.tokens) == len(accepted.path) - accepted.open
        assert [tree.parents[node] for node in accepted.path[1:]] == list(accepted.path[:-1])
        unsure = accepted.open
    assert text == plain


def build(vocab: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=256, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return freeze(LlamaForCausalLM(config))  # type: ignore[return-value]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(5, 300), st.integers(0, 1000), st.integers(1, 20), st.floats(0, 1), st.booleans(),
    st.sampled_from(["parallel", "deferred"]), st.sampled_from(["bitwise", "near-tie", "off"]),
)  # fmt: skip
def test_any_drafts_over_any_prompt_give_the_base_s_own_tokens(
    vocab: int, seed: int, length: int, chance: float, do_sample: bool, schedule: str, exact: str
) -> None:
    model = build(vocab, seed)
    fast = accelerate(model, new_adapter(model, tiny_config(num_msa_layers=1)).randomize(seed), schedule=schedule, exact=exact)
    ids = torch.randint(1, vocab, (1, length), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=do_sample)[0, length:].tolist()
    luck = random.Random(seed)

    class Lucky(Drafter):
        def __init__(self) -> None: ...

        def trees(self, streams: torch.Tensor, roots: list[int], max_nodes: int, memories: object, *rest: object) -> list[DraftTree]:
            done = sum(n * count for n, count in fast.stats.accepted.items())  # after the prefill's token
            return [random_tree(roots[0], vocab, luck, answer[done + 1 :], chance)]

    fast.attached.drafter = Lucky()
    expected, found = both(fast, ids, seed, max_new_tokens=30, do_sample=do_sample)
    assert torch.equal(expected, found)
