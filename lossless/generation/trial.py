"""A trial of a base: can it carry a draft tree at all?

Knows: how to compare a pass over a small tree with the base's own passes, and how to say what went wrong. Does not know: how exactly
rows are rounded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicCache

from ..base.layers import CACHE, as_decoding, as_generating, input_device
from ..drafting.tree import DraftTree
from ..errors import CALLED_OTHERWISE, UsageError
from ..streams.cache import RowCache
from ..streams.runner import StreamRunner

# logits further off than this part of their spread are another computation, not another rounding
_FAR_FLOAT32, _FAR_COARSER = 0.01, 0.25
_STEPS = (1, 101, 1009)  # from one token of a trial's text to the next


def too_far(model: Any) -> float:
    """How far off, as a part of their spread, logits are too far to be the same computation rounded otherwise."""
    return _FAR_FLOAT32 if is_fine(model) else _FAR_COARSER


def is_fine(model: Any) -> bool:
    """Whether it computes with float32 weights, so that roundings are small: not where the user lets oneDNN multiply them in bfloat16."""
    weight, mkldnn = model.get_input_embeddings().weight, cast(Any, torch.backends.mkldnn)
    coarse = weight.device.type == "cpu" and mkldnn.matmul.fp32_precision == "bf16"
    return bool(weight.dtype == torch.float32) and not coarse and not getattr(model, "is_quantized", False)


@contextlib.contextmanager
def trial(model: Any) -> Iterator[None]:
    """What a base's first passes end with is said as what it is; too little memory is nobody's fault."""
    try:
        yield
    except (UsageError, torch.OutOfMemoryError, MemoryError):
        raise
    except (*CALLED_OTHERWISE, AssertionError) as error:
        what = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UsageError(
            f"{type(model).__name__} cannot be accelerated: a trial of a pass over a draft tree ended in {type(error).__name__}: {what}"
        ) from error


def plain_pass(model: Any, ids: list[int], cache: DynamicCache) -> torch.Tensor:
    """`[vocab]`: the base's own logits after these tokens, in one pass behind its cache."""
    given = torch.tensor([ids], device=input_device(model))
    told = as_generating(model, given, cache.get_seq_length())
    return model(**told, **{CACHE: cache}, use_cache=True).logits[0, -1].float()


@torch.no_grad()
def check_served(runner: StreamRunner) -> None:
    """A trial: a prompt, then a tree of two branches with streams, against the base's own passes of one row.

    In 16 bits and fewer the roundings of some texts add up to other logits, however the text is read: so there is more than one.

    Raises:
        UsageError: a pass over a draft tree fails, or gives other logits whatever the text.
    """
    model, name = runner.base, type(runner.base).__name__
    far, off = too_far(model), math.inf
    for step in _STEPS[: 1 if is_fine(model) else None]:
        with trial(model):
            off = min(off, _off(runner, [1 + step * i % (runner.text_config.vocab_size - 1) for i in range(7)]))
        if off < far:
            return
    raise UsageError(
        f"{name} cannot be accelerated: over a draft tree it gives other logits than in a pass of its own (off by {off:.2g} of their spread, allowed is {far})"
    )


def _off(runner: StreamRunner, tokens: list[int]) -> float:
    """How far off, as a part of their spread, logits over a tree of these tokens are."""
    model, cache, device = runner.base, RowCache(len(runner.layers)), input_device(runner.base)
    tree, branches = DraftTree((*tokens[3:5], tokens[6], tokens[5]), (-1, 0, 0, 1)), ((0, 1, 3), (0, 2))
    runner.verify(torch.tensor([tokens[:3]], device=device), torch.arange(3, device=device)[None], None, cache, None, last_only=True)
    if not any(layer.is_initialized for layer in cache.rows):
        raise UsageError(f"{type(model).__name__} cannot be accelerated: it leaves no keys in a cache for later passes to look back at")
    cache.keep(range(3))
    places = torch.tensor([tree.depths], device=device) + 3
    nodes = None if runner.fused else torch.arange(len(tree))  # fused layers carry no streams
    out = runner.verify(torch.tensor([tree.tokens], device=device), places, tree.mask()[None].to(device), cache, nodes)
    cache.keep([0])
    context = torch.ones(1, 1, 4, dtype=torch.bool, device=device)
    there = out.entry.device
    runner.speculate(out.entry[:, :1], places[:, :1].to(there), context.to(there), cache)
    found = 0.0
    for branch in branches:
        own = DynamicCache(config=model.config)
        plain_pass(model, tokens[:3], own)
        with as_decoding(model):
            plain = torch.stack([plain_pass(model, [tree.tokens[node]], own) for node in branch])  # [rows, vocab]
        apart = (out.logits[0, list(branch)].float() - plain).abs().max()
        found = max(found, number_or_infinity(apart / plain.std()) if apart else 0.0)
    return found


def number_or_infinity(value: torch.Tensor) -> float:
    """What is no number is as far off as can be: `max` would pass it over."""
    return math.inf if value.isnan() else float(value)
