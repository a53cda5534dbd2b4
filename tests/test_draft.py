"""Drafting: the tree holds the likeliest paths."""

from __future__ import annotations

import pytest
import torch

from lossless.drafting.ngram import NGramCache
from lossless.drafting.tree import DraftTree
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.streams.cache import RowCache

from .conformance.families import build
from .conftest import prompt_ids, tiny_config


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
