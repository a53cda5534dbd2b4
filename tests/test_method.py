"""The paper's parts that an adapter may have or not: each trains, none changes a token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lossless.adapter.compat import new_adapter
from lossless.distillation.answers import Answers
from lossless.drafting.drafter import Drafter
from lossless.drafting.pruning import worth_streams
from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.streams.runner import StreamRunner
from lossless.training.features import FeatureStore, make_batch
from lossless.training.loss import StreamLoss

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both
from .test_train import answer

PARTS: dict[str, dict[str, Any]] = {
    "no transition": {"transition_rank": 0},
    "f": {"init_rank": 4},
    "told": {"next_token_rank": 4, "schedule": "deferred"},
    "rotated values": {"rotate_values": True},
    "pruning": {"pruning_rank": 4, "pruning_floor": 0.02},
    "pruning, few words": {"pruning_rank": 4, "pruning_floor": 0.02, "draft_vocab_size": 40},
    "the paper": {"transition_rank": 0, "pruning_rank": 4, "recall": False},
    "everything": {"init_rank": 4, "next_token_rank": 4, "rotate_values": True, "pruning_rank": 4, "schedule": "deferred"},
}


def attach(part: str, **changes: Any) -> AcceleratedModel:
    model, config = build_tiny(seed=5), tiny_config(**PARTS[part] | changes)
    ids = torch.arange(20, 60) if config.draft_vocab_size else None
    return accelerate(model, new_adapter(model, config, draft_ids=ids).randomize(3))


@pytest.mark.parametrize("part", PARTS)
def test_no_part_changes_a_token(part: str) -> None:
    for schedule in ("deferred",) if "deferred" in PARTS[part].values() else ("deferred", "parallel"):
        fast = attach(part, schedule=schedule)
        for options in ({}, {"do_sample": True, "temperature": 0.7}):
            expected, found = both(fast, prompt_ids(), 3, **options)
            assert torch.equal(expected, found)
        ids = prompt_ids(12).view(2, 6)
        expected, found = both(fast, ids, 3, attention_mask=torch.ones_like(ids))
        assert torch.equal(expected, found)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_a_gradient_and_the_base_has_none(part: str, tmp_path: Path) -> None:
    fast = attach(part)
    model, adapter = fast.base, fast.adapter
    runner = StreamRunner(model, adapter)
    drafter = Drafter(adapter, model.get_input_embeddings(), model.get_output_embeddings())
    stored = Answers.of([answer(prompt_ids(5, i)[0].tolist(), prompt_ids(14, 9 + i)[0].tolist()) for i in range(3)])
    features = FeatureStore(runner, stored, memory_gb=1).get([0, 1, 2])
    block = make_batch(features, [f.prompt - 1 for f in features], 6, 4, runner.first_top, torch.float32)
    StreamLoss(runner, drafter, 1.0)(block)[0].backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(adapter.parts().values()) == adapter.parameter_count()
    adapter.save_pretrained(tmp_path)
    again = accelerate(model, tmp_path).adapter
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].float(), tensor.float(), rtol=1e-3, atol=1e-3)


def test_hard_labels_are_cross_entropy_to_the_base_s_best() -> None:
    fast = attach("f")
    runner, drafter = StreamRunner(fast.base, fast.adapter), fast.drafter
    stored = Answers.of([answer(prompt_ids(5)[0].tolist(), prompt_ids(14, 9)[0].tolist())])
    with torch.no_grad():
        features = FeatureStore(runner, stored, memory_gb=1).get([0])
        block = make_batch(features, [4], 6, 4, runner.first_top, torch.float32)
        _, soft, same = StreamLoss(runner, drafter, 1.0)(block)
        _, hard, agreement = StreamLoss(runner, drafter, 1.0, hard_labels=True)(block)
    assert torch.equal(same, agreement)
    assert (hard > 0).all()
    assert not torch.allclose(soft, hard)


def test_streams_that_are_told_the_next_token_depend_on_it() -> None:
    fast = attach("told")
    runner, entry = fast.runner, torch.randn(1, 2, 32)
    told = runner.model.get_input_embeddings()(torch.tensor([[5, 9]]))
    one, other = (runner.adapter.start_streams(entry, t) for t in (told, told.flip(1)))
    assert one.shape == (1, 2 * 4, 32)
    assert not torch.allclose(one, other)
    assert torch.allclose(one[:, :4] - other[:, :4], -(one[:, 4:] - other[:, 4:]), atol=1e-5)
    with pytest.raises(UsageError, match="schedule must be deferred where streams are told"):
        accelerate(fast.base, fast.adapter, schedule="parallel")


def test_turned_values_tell_streams_apart_where_embeddings_do_not() -> None:
    model = build_tiny(seed=5)
    drawn = {}
    for rotate in (False, True):
        adapter = new_adapter(model, tiny_config(rotate_values=rotate, transition_rank=0)).randomize(3)
        if not rotate:
            torch.nn.init.zeros_(adapter.stream_embeddings)  # type: ignore[arg-type]
        runner = StreamRunner(model, adapter)
        with torch.no_grad():
            nodes = torch.tensor([6])
            out = runner.verify(prompt_ids(), torch.arange(7)[None], None, fresh_cache(), nodes)
        drawn[rotate] = out.streams[0, 0]  # [gamma, dim]
    # streams differ by their places in the text alone (rotary), unless their values are turned
    assert (drawn[True] - drawn[False]).abs().max() > 0.05
    assert adapter.stream_embeddings is None
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)).eval()
    with pytest.raises(UsageError, match="rotate_values needs layers with a value projection"):
        accelerate(gpt2, tiny_config(rotate_values=True, num_msa_layers=1))


def fresh_cache() -> Any:
    from lossless.streams.cache import RowCache

    return RowCache(4)


def test_weak_paths_get_no_streams() -> None:
    """root -> a (0.6) -> c (0.5); root -> b (0.05) -> d (0.9), where d alone is not in the draft vocabulary."""
    tree = DraftTree((10, 11, 12, 13, 14), (-1, 0, 0, 1, 2))
    numbers = torch.full((20,), -1)
    numbers[torch.tensor([11, 12, 13])] = torch.arange(3)
    logits = torch.tensor([[0.6, 0.05, 0.35], [0.25, 0.25, 0.5], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]]).log()[None]
    assert worth_streams(logits, [tree], numbers, 0.0) == [0, 1, 2, 3, 4]
    assert worth_streams(logits, [tree], numbers, 0.2) == [0, 1, 3]
    assert worth_streams(logits, [tree], numbers, 0.31) == [0, 1]
    assert worth_streams(logits, [tree], numbers, 0.9) == [0]
    assert worth_streams(logits, [tree], numbers, 0.04) == [0, 1, 2, 3, 4]  # d as likely as b
    turned = logits.flip(-1)
    assert worth_streams(torch.cat([logits, turned]), [tree, tree], numbers, 0.31) == [0, 1]
    whole = torch.full((1, 5, 20), math.log(1 / 20))
    assert worth_streams(whole, [tree], None, 0.01) == [0, 1, 2]


@pytest.mark.usefixtures("float_drafts")
def test_a_walk_that_ends_on_a_pruned_node_speculates_after_it() -> None:
    """Fewer nodes carry streams, and yet nothing that would be drafted is lost."""
    lengths, speculated, wrongly = [], [], []
    adapter = attach("pruning", schedule="parallel", recall=False).adapter
    for floor in (0.0, 0.02, 0.99):
        fast = accelerate(build_tiny(seed=5), adapter, pruning_floor=floor, exact="off", adaptive=False)  # under near-tie a lone root carries none
        expected, found = both(fast, prompt_ids())
        assert torch.equal(expected, found)
        lengths.append(fast.stats.acceptance_length)
        speculated.append(fast.stats.speculated)
        wrongly.append(fast.stats.pruned_wrongly)
        if floor == 0.0:
            assert fast.stats.speculated == fast.stats.drafted + fast.stats.target_passes
        if floor == 0.99:
            assert fast.stats.speculated == fast.stats.target_passes
    assert speculated[0] > speculated[1] > speculated[2]
    assert 0 == wrongly[0] <= wrongly[1] <= wrongly[2]
    assert len(set(lengths)) == 1
