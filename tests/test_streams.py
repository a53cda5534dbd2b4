"""Stream rows: what they see, and that main rows do not see them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from lossless.adapter.compat import new_adapter
from lossless.base.layers import CACHE, decoder_layers, find_projections
from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError
from lossless.generation.model import AcceleratedModel
from lossless.streams import layers
from lossless.streams.cache import RowCache
from lossless.streams.runner import StreamRunner

from .conformance.families import WINDOW, build
from .conftest import build_tiny, prompt_ids, tiny_config

TREE = DraftTree((11, 12, 13, 14, 15), (-1, 0, 0, 1, 3))


def verify_after_prompt(runner: StreamRunner, ids: torch.Tensor, nodes: list[int] | None):  # type: ignore[no-untyped-def]
    cache = RowCache(4)
    with torch.no_grad():
        runner.verify(ids, torch.arange(ids.shape[1])[None], None, cache, None)
        cache.keep(range(ids.shape[1]))
        positions = torch.tensor([TREE.depths]) + ids.shape[1]
        chosen = None if nodes is None else torch.tensor(nodes)
        return runner.verify(torch.tensor([TREE.tokens]), positions, TREE.mask()[None], cache, chosen)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tree_pass_says_what_the_plain_base_says_on_every_path(attention: str) -> None:
    model, ids = build_tiny(attention=attention), prompt_ids()
    runner = StreamRunner(model, new_adapter(model, tiny_config()).randomize(1))
    out = verify_after_prompt(runner, ids, [0, 2, 4])
    for node in range(len(TREE)):
        path, at = [], node
        while at >= 0:
            path.append(TREE.tokens[at])
            at = TREE.parents[at]
        plain = model(torch.cat([ids, torch.tensor([path[::-1]])], dim=1)).logits[0, -1]
        torch.testing.assert_close(out.logits[0, node], plain, rtol=0, atol=2e-5)


def test_main_rows_do_not_depend_on_streams(fast: AcceleratedModel) -> None:
    without = verify_after_prompt(fast.runner, prompt_ids(), None)
    for nodes in ([0], [1, 3], [0, 1, 2, 3, 4]):
        out = verify_after_prompt(fast.runner, prompt_ids(), nodes)
        torch.testing.assert_close(out.logits, without.logits, rtol=0, atol=2e-5)
        assert out.streams is not None
        assert out.streams.shape == (1, len(nodes), 4, 32)


def test_streams_of_a_node_depend_on_its_path_alone(fast: AcceleratedModel) -> None:
    everyone = verify_after_prompt(fast.runner, prompt_ids(), [0, 1, 2, 3, 4])
    for node in range(5):
        alone = verify_after_prompt(fast.runner, prompt_ids(), [node])
        torch.testing.assert_close(everyone.streams[0, node], alone.streams[0, 0], rtol=0, atol=2e-5)


@pytest.mark.usefixtures("float_drafts")
def test_deferred_streams_are_the_parallel_ones(fast: AcceleratedModel) -> None:
    runner, ids, cache = fast.runner, prompt_ids(), RowCache(4)
    with torch.no_grad():
        out = runner.verify(ids, torch.arange(7)[None], None, cache, torch.tensor([6]))
        cache.keep(range(7))
        context = torch.ones(1, 1, 7, dtype=torch.bool)
        later = runner.speculate(out.entry[:, 6:7], torch.tensor([[6]]), context, cache)
    torch.testing.assert_close(later[0, 0], out.streams[0, 0], rtol=0, atol=2e-5)
    with torch.no_grad():  # anew: no main rows have shown how the base calls its layers
        torch.testing.assert_close(runner.speculate(out.entry[:, 6:7], torch.tensor([[6]]), context, cache), later, rtol=0, atol=2e-5)


def test_stream_j_sees_no_later_stream(fast: AcceleratedModel) -> None:
    before = verify_after_prompt(fast.runner, prompt_ids(), [2]).streams[0, 0]
    with torch.no_grad():
        fast.runner.adapter.stream_embeddings[2] += 1.0  # stream 3
    after = verify_after_prompt(fast.runner, prompt_ids(), [2]).streams[0, 0]
    moved = (after - before).abs().amax(-1) > 1e-4
    assert moved.tolist() == [False, False, True, True]


def test_projections_of_the_top_layers_are_found(tiny: LlamaForCausalLM) -> None:
    found = find_projections(tiny, 2)
    assert len(found) == 14
    assert found["1.mlp.down_proj"] == (48, 32)
    assert len(decoder_layers(tiny)) == 3
    tiny.config.num_hidden_layers = 7
    with pytest.raises(UsageError, match="no list of 7 decoder layers"):
        decoder_layers(tiny)


def test_streams_of_a_large_model_run_over_its_own_weights(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the top layers with the adapters in it is only made where it is little beside the base."""
    runner = StreamRunner(tiny, new_adapter(tiny, tiny_config()).randomize(1).requires_grad_(False))
    name = "0.mlp.up_proj"
    own = runner.top.get_submodule(name).weight
    for room, shared in ((2**40, False), (8, True)):
        monkeypatch.setattr(layers, "_ALWAYS", 0)
        part = layers.stream_layers(runner._unhooked, runner.adapter, runner._unhooked, room).get_submodule(name)
        assert (part.weight is own) == shared
        assert bool(part._forward_hooks) == shared
    assert not runner._unhooked.get_submodule(name)._forward_hooks


def test_a_row_alone_behind_a_sliding_window_has_the_base_s_bits_under_near_tie() -> None:
    """What is read again because it is too close to call is read as the base reads it, not over masked keys."""
    base = build("mistral").to(torch.bfloat16)
    runner, ids = StreamRunner(base, new_adapter(base, tiny_config())), prompt_ids(1)
    ours, theirs = RowCache(4), DynamicCache(config=base.config)
    with torch.no_grad():
        for place in range(3 * WINDOW):
            found = runner.verify(ids, torch.tensor([[place]]), None, ours, None).logits
            ours.keep([0])
            expected = base(ids, **{CACHE: theirs}, use_cache=True).logits
            assert torch.equal(found, expected), place
            ids = expected[:, -1:].argmax(-1)


def test_a_prompt_behind_a_sliding_window_has_the_base_s_bits() -> None:
    """Its rows have a mask, and heads that share keys may round otherwise beside each other: those of one prompt among thousands did."""
    found_by_fuzz = torch.tensor([[75, 68, 13, 26, 29, 4, 78, 16, 53, 41, 46, 40, 35, 10, 68, 8, 87]])
    base = build("mistral").bfloat16()
    reader = StreamRunner(base, new_adapter(base, tiny_config()).randomize(1))
    for ids in (found_by_fuzz, *(prompt_ids(17, seed=seed) for seed in range(5))):
        ours, theirs = RowCache(4, 20), DynamicCache()  # which keeps what is behind the window, too
        found = reader.verify(ids, torch.arange(17)[None], None, ours, None, last_only=True)
        with torch.no_grad():
            expected = base(ids, use_cache=True, logits_to_keep=1, **{CACHE: theirs}).logits
        assert torch.equal(found.logits[0, -1], expected[0, -1])
        for own, kept in zip(theirs.layers, ours.rows, strict=True):
            assert torch.equal(own.keys, kept.keys[:, :, :17])
