"""The cache keeps accepted rows and forgets the others."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lossless.cache import RowCache

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


def test_a_model_reads_it_as_it_reads_hf_s_own() -> None:
    model, ids = build_tiny(), prompt_ids(9)
    ours, theirs = RowCache(4), DynamicCache(config=model.config)
    for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        a = model(step, past_key_values=ours, use_cache=True).logits
        b = model(step, past_key_values=theirs, use_cache=True).logits
        ours.keep(range(step.shape[1]))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
