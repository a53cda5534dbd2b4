"""Drafting: the tree holds the likeliest paths."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from lossless.adapter.compat import new_adapter
from lossless.adapter.weights import Transition
from lossless.base.drafts import likeliest, table_of
from lossless.base.linears import draft_linear
from lossless.drafting.ngram import NGramCache
from lossless.drafting.noise import NoiseBias
from lossless.drafting.tree import DraftTree
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.kernels import native
from lossless.streams.cache import RowCache

from .conformance.families import build
from .conftest import VOCAB, prompt_ids, tiny_config


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return set(found)


@pytest.mark.parametrize("family", ["llama", "cohere", "granite", "gemma2"])
def test_drafts_are_scaled_as_the_base_scales_its_logits(family: str) -> None:
    fast = accelerate(build(family), tiny_config())
    ids = prompt_ids(9)
    with torch.no_grad():
        logits = fast.base(ids).logits
        _, final = fast.runner.observe(ids, RowCache(len(fast.runner.layers)))
        drafted = fast.drafter.logits(final)
    spread = (logits - logits.mean(-1, keepdim=True)).std()
    assert (drafted - logits).abs().max() < 0.1 * spread  # a soft cap is not quite a line
    assert family != "llama" or fast.drafter.scale == 1.0
    assert family != "cohere" or fast.drafter.scale == pytest.approx(fast.base.config.logit_scale, rel=1e-3)


def test_each_sequence_of_a_batch_gets_the_tree_that_it_would_get_alone(fast: AcceleratedModel) -> None:
    streams, roots = torch.randn(3, 4, 32), [5, 9, 5]
    ngrams = [NGramCache([5, 6, 7, 8, 5]), None, NGramCache([1, 5, 2, 5])]
    together = fast.drafter.trees(streams, roots, 12, ngrams)
    alone = [fast.drafter.trees(streams[i : i + 1], roots[i : i + 1], 12, ngrams[i : i + 1])[0] for i in range(3)]
    assert [paths(tree) for tree in together] == [paths(tree) for tree in alone]


def test_memory_goes_on_where_streams_end(fast: AcceleratedModel) -> None:
    litany = [11, 12, 13, 14, 15, 16, 17, 18] * 6
    ngrams = NGramCache(litany[:8])
    ngrams.extend(litany[8:])
    [tree] = fast.drafter.trees(torch.randn(1, 4, 32), [18], 12, [ngrams])
    assert max(tree.depths) > fast.adapter.config.num_streams
    assert (18, 11, 12, 13, 14, 15, 16) in paths(tree)


@pytest.mark.skipif(not native.available(), reason="no kernels on this machine: they take gcc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("nodes", [1, 5, 13])
def test_a_level_in_c_is_that_of_the_transition_head(nodes: int, scale: float, dtype: torch.dtype) -> None:
    transition, head, ids = Transition(48, 32, 4), draft_linear(torch.randn(80, 48), None, torch.float32), torch.randperm(99)[:80]
    torch.nn.init.normal_(transition.out)
    torch.nn.init.normal_(transition.bias)
    transition.cheapen(torch.float32)
    r, table = torch.randn(3, 32), torch.randn(99, 48).to(dtype)
    heard, streams = torch.randn(2, 4, 32), torch.randn(2, 4, 48)
    of = torch.stack([torch.randint(most, (nodes,)) for most in (99, 3, 2)])
    level = transition.fused(head, scale, ids)
    assert level is not None
    with torch.no_grad():
        expected = transition.advance(r[of[1]], table[of[0]].float(), heard[of[2], 2])
        logits = scale * head(transition.adjust(streams[of[2], 2], expected))
        begun = transition.begin(streams[:, 0]), transition.hear(streams)
    for ours, theirs in zip(level.begin(streams), begun, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    found, drawn, tokens, scores = level(of, r, table, heard, streams, 2, 8)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (drawn - logits).abs().max() < 0.03 * logits.std()  # a number may be rounded to another byte
    top = drawn.log_softmax(-1).topk(8)
    torch.testing.assert_close(scores, top.values)
    assert torch.equal(tokens.long(), ids[top.indices])


def test_a_level_is_in_c_only_where_its_products_are() -> None:
    transition = Transition(48, 24, 4)
    assert transition.fused(draft_linear(torch.randn(80, 48), None, torch.float32), 1.0, None) is None  # it learns
    transition.cheapen(torch.float32)
    assert transition.fused(draft_linear(torch.randn(80, 48), None, torch.float32), 1.0, None) is None  # a rank that vectors do not fit


def test_embeddings_are_looked_up_in_c_only_if_that_is_all_they_do() -> None:
    assert table_of(torch.nn.Embedding(9, 16)) is not None
    assert table_of(torch.nn.Embedding(9, 16).bfloat16()) is not None
    assert table_of(torch.nn.Embedding(9, 16).double()) is None
    assert table_of(torch.nn.Embedding(9, 16, max_norm=1.0)) is None
    assert table_of(type("Scaled", (torch.nn.Embedding,), {})(9, 16)) is None
    heard = torch.nn.Embedding(9, 16)
    heard.register_forward_hook(lambda *_: None)
    assert table_of(heard) is None


@pytest.mark.parametrize("vocab", [80, 1001])
def test_the_likeliest_tokens_are_those_of_torch(vocab: int) -> None:
    logits = 3 * torch.randn(5, vocab)
    logits[1, 7:] = -torch.inf
    top = logits.log_softmax(-1).topk(8)
    numbers, scores = likeliest(logits, 8)
    torch.testing.assert_close(scores[:, :7], top.values[:, :7])
    assert torch.equal(numbers[:, :7].long(), top.indices[:, :7])
    assert scores[1, 7] == -torch.inf


def test_rows_of_what_is_no_number_draft_nothing() -> None:
    _, scores = likeliest(torch.full((2, 80), torch.nan), 4)
    assert not (scores > -torch.inf).any()


@pytest.mark.skipif(not native.available(), reason="no kernels on this machine: they take gcc")
@pytest.mark.parametrize("sampled", [None, 0, 50], ids=["greedy", "of all", "of the best"])
@pytest.mark.parametrize("at_hand", [True, False])
def test_trees_are_the_same_with_levels_in_c(tiny: LlamaForCausalLM, sampled: int | None, at_hand: bool) -> None:
    adapter = new_adapter(tiny, tiny_config(transition_rank=16, draft_vocab_size=80), draft_ids=torch.arange(10, 90))
    fast = accelerate(tiny, adapter.randomize(1))
    streams, roots, ngrams = torch.randn(2, 4, 32), [5, 9], [None, None]
    bias = None if sampled is None else NoiseBias(torch.rand(2, 4, VOCAB) + 0.1, 1.2, sampled)
    assert fast.drafter._fused is not None
    assert fast.drafter._table is not None
    if not at_hand:
        fast.drafter._table = None
    found = fast.drafter.trees(streams, roots, 12, ngrams, bias)
    fast.drafter._fused = None
    expected = fast.drafter.trees(streams, roots, 12, ngrams, bias)
    shared = [len(paths(a) & paths(b)) for a, b in zip(found, expected, strict=True)]
    assert min(shared) >= 10  # of 12; a number that is rounded to another byte may exchange two that are about as likely
