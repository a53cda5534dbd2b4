"""Fused decoder layers in the passes of a runner.

Knows: which passes they can serve: rows of one text without padding, none of them a stream. Every other goes through the layer itself.
Does not know: what a fused layer computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base.fused import FusedLayer
from ..base.layers import input_device
from .cache import RowCache
from .passes import PASS

_SAME = 1e-3  # of the spread of logits: further off, a layer computes something else


@torch.no_grad()
def fuse_passes(runner: Any) -> None:
    """From now on a runner's layers go the short way in passes that allow it, if they all look as if they could, and then compute the same.

    Nobody but the runner may call its layers: those of a twin.
    """
    if not fuse(runner.layers):
        return
    device, cache, found = input_device(runner.model), RowCache(len(runner.layers)), []
    ids = torch.tensor([[1 + 3 * i % (runner.text_config.vocab_size - 1) for i in range(7)]], device=device)
    places, seen = torch.tensor([[0, 1, 2, 3, 4, 5, 5]], device=device), torch.ones(1, 3, 3, dtype=torch.bool, device=device).tril()
    seen[0, 2, 1] = False  # two ways on
    runner.verify(ids[:, :4], places[:, :4], None, cache, None)
    cache.keep(range(4))
    for runner.fused in (False, True):
        found.append(runner.verify(ids[:, 4:], places[:, 4:], seen, cache, None).logits)
    if not (found[1] - found[0]).abs().max() < _SAME * found[0].std():
        runner.fused = False
        for layer in runner.layers:
            layer.__dict__.pop("forward", None)


def fuse(layers: nn.ModuleList) -> bool:
    """From now on these layers, which nobody else may call, go the short way where they can; False, and nothing is done, unless all of
    them look as if they could."""
    found = [FusedLayer.of(layer) for layer in layers]
    if not all(found):
        return False
    layer: Any
    for layer, fused in zip(layers, found, strict=True):
        layer.forward = _shortened(layer.forward, fused, layer.self_attn.layer_idx)
    return True


def _shortened(forward: Any, fused: Any, number: int) -> Any:
    """A layer's forward, by its fused one if the pass is such that it serves."""

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan, turned = PASS.get(), kwargs.get("position_embeddings")
        if plan is None or plan.paths is None or plan.begin is not None or args or turned is None or hidden_states.dtype is not fused.dtype:
            return forward(hidden_states, *args, **kwargs)
        cos, sin = (each.contiguous() for each in turned)
        hidden = hidden_states.contiguous()
        if not isinstance(plan.cache, RowCache) or cos.dtype is not fused.dtype or cos.shape != (1, hidden.shape[1], fused.head_dim):
            return forward(hidden_states, *args, **kwargs)
        query, key, value = fused.before(hidden, cos, sin)
        keys, values = plan.cache.update(key, value, number)
        return fused.behind(hidden, query, keys, values, plan.paths.tensors)

    return run
