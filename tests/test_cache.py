"""The cache keeps accepted rows and forgets the others."""

from __future__ import annotations

import itertools
import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from lossless.base.layers import CACHE
from lossless.streams.cache import RowCache, RowLayer

from .conftest import build_tiny, prompt_ids


def rows(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 3)


def test_provisional_rows_are_overwritten_until_kept() -> None:
    cache = RowCache(1)
    cache.update(rows([1, 2]), rows([1, 2]), 0)
    assert cache.length == 0
    keys, _ = cache.update(rows([3]), rows([3]), 0)
    assert keys[0, 0, :, 0].tolist() == [3]


@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 2], [0, 2, 4], [0, 1, 4]])
def test_kept_rows_move_up_in_order(kept: list[int]) -> None:
    cache = RowCache(2)
    for layer in range(2):
        cache.update(rows([7, 8]), rows([7, 8]), layer)
    cache.keep([0, 1])
    for layer in range(2):
        cache.update(rows([10, 11, 12, 13, 14]), rows([10, 11, 12, 13, 14]), layer)
    cache.keep(kept)
    for layer in range(2):
        keys, values = cache.update(rows([99]), rows([99]), layer)
        expected = [7, 8] + [10 + i for i in kept] + [99]
        assert keys[0, 1, :, 2].tolist() == expected
        assert values[0, 0, :, 0].tolist() == expected


def test_storage_grows_and_keeps_what_it_holds() -> None:
    cache = RowCache(1, capacity=2)
    for start in range(0, 600, 3):
        cache.update(rows([start, start + 1, start + 2]), rows([start, start + 1, start + 2]), 0)
        cache.keep(range(3))
    keys, _ = cache.update(rows([-1]), rows([-1]), 0)
    assert keys[0, 0, :-1, 0].tolist() == list(range(600))


def test_room_for_layers_together_is_the_same_while_it_suffices_and_grows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, like, held = RowCache(3, capacity=4), torch.zeros(1, 2, 0, 3), []
    before = cache.room(range(3), 4, like)
    assert cache.room(range(3), 4, like) is before
    assert [keys.data_ptr() for keys, _ in before.kept] == [layer.keys.data_ptr() for layer in cache.rows]
    old = [weakref.ref(each) for pair in before.kept for each in pair]
    del before
    reserve = RowLayer.reserve

    def counted(layer: RowLayer, rows: int) -> None:
        reserve(layer, rows)
        held.append(sum(ref() is not None for ref in old))

    monkeypatch.setattr(RowLayer, "reserve", counted)
    grown = cache.room(range(3), 5, like)
    assert held == [4, 2, 0]
    assert all(keys is layer.keys and keys.shape[2] >= 5 for (keys, _), layer in zip(grown.kept, cache.rows, strict=True))
    cache.select([0])
    assert cache.room(range(3), 5, like).kept[0][0] is cache.rows[0].keys


def test_a_model_reads_it_as_it_reads_hf_s_own() -> None:
    model, ids = build_tiny(), prompt_ids(9)
    ours, theirs = RowCache(4), DynamicCache(config=model.config)
    for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        a = model(step, **{CACHE: ours}, use_cache=True).logits
        b = model(step, **{CACHE: theirs}, use_cache=True).logits
        ours.keep(range(step.shape[1]))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.randoms(use_true_random=False))
def test_texts_of_a_batch_keep_rows_of_their_own(texts: int, capacity: int, luck: random.Random) -> None:
    """Against lists: any paths of any lengths, storage that grows, texts that leave."""
    cache, numbers = RowCache(2, capacity), itertools.count(1.0)
    kept: list[list[float]] = [[] for _ in range(texts)]
    for _ in range(luck.randint(1, 8)):
        count = luck.randint(1, 5)
        fresh = torch.tensor([[next(numbers) for _ in range(count)] for _ in kept])
        states = fresh[:, None, :, None].expand(-1, 2, -1, 3)
        for layer in range(2):
            cache.update(states, -states, layer)
        paths = [[0, *sorted(luck.sample(range(1, count), luck.randint(0, count - 1)))] for _ in kept]
        cache.keep_each(paths)
        for own, path, row in zip(kept, paths, fresh.tolist(), strict=True):
            own += [row[node] for node in path]
        if len(kept) > 1 and luck.random() < 0.3:
            staying = sorted(luck.sample(range(len(kept)), luck.randint(1, len(kept) - 1)))
            cache.select(staying)
            kept = [kept[text] for text in staying]
        if len(kept) == 1 and luck.random() < 0.3:
            length = luck.randint(0, len(kept[0]))
            cache.forget(length)
            del kept[0][length:]
        seen = cache.visible()
        assert cache.length == max(map(len, kept))
        for layer in cache.rows:
            for text, own in enumerate(kept):
                columns = slice(0, cache.length) if seen is None else seen[text].nonzero().flatten()
                assert layer.keys[text, 1, : cache.length][columns][:, 0].tolist() == own
                assert layer.values[text, 0, : cache.length][columns][:, 2].tolist() == [-number for number in own]


def test_rows_come_from_another_cache_and_go_back_to_it() -> None:
    theirs, ours = DynamicCache(), RowCache(2)
    for layer in range(2):
        theirs.update(rows([1, 2, 3]), rows([4, 5, 6]), layer)
    ours.adopt(theirs)
    assert ours.length == 3
    for layer in range(2):
        ours.update(rows([7, 8, 9]), rows([7, 8, 9]), layer)
    ours.keep([0, 2])
    ours.pass_on(theirs)
    assert theirs.get_seq_length() == 5
    for layer in theirs.layers:
        assert layer.keys[0, 0, :, 0].tolist() == [1, 2, 3, 7, 9]
        assert layer.values[0, 1, :, 2].tolist() == [4, 5, 6, 7, 9]
