"""Fused decoder layers in the passes of a runner.

Knows: which passes they can serve: rows of one text without padding, none of them a stream. Every other goes through the layer itself.
Does not know: what a fused layer computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base import exact
from ..base.fused import FusedLayer, FusedLayers
from ..base.layers import input_device
from ..base.norms import fused
from ..base.packed import put
from .cache import RowCache
from .passes import PASS, Pass

_SAME = 1e-3  # of the spread of logits: further off, a layer computes something else
_ALIKE = 0.4  # of the spread of streams, which may be wrong: by what their numbers, of 8 and 16 bits, are rounded


@torch.no_grad()
def fuse_passes(runner: Any) -> None:
    """From now on a runner's layers go the short way in passes that allow it, if they all look as if they could, and then compute the same.

    Nobody but the runner may call its layers: those of a twin.
    """
    if not fuse(runner.layers, runner.first_top, runner.own_hooks):
        return
    device, cache, found = input_device(runner.model), RowCache(len(runner.layers)), []
    ids = torch.tensor([[1 + 3 * i % (runner.text_config.vocab_size - 1) for i in range(7)]], device=device)
    places, seen = torch.tensor([[0, 1, 2, 3, 4, 5, 5]], device=device), torch.ones(1, 3, 3, dtype=torch.bool, device=device).tril()
    seen[0, 2, 1] = False  # two ways on
    runner.verify(ids[:, :4], places[:, :4], None, cache, None)
    cache.keep(range(4))
    for runner.fused in (False, True):
        found.append(runner.verify(ids[:, 4:], places[:, 4:], seen, cache, None).logits)
    served = all(run.passes for run in runs_of(runner.layers))
    if not served or not (found[1] - found[0]).abs().max() < _SAME * found[0].std():
        runner.fused = False
        for layer in runner.layers:
            layer.__dict__.pop("forward", None)


def exact_when_fused(runner: Any) -> bool:
    """The same for a runner of an exact twin, whose layers then look as if they had the bits that rows have alone; whether they do is not
    tried here. False, and nothing is done, unless all of them do."""
    like = FusedLayer.of(runner.layers[0])
    if runner.implementation != "sdpa" or like is None or not like.exactly or not exact.attends(like.dtype, like.head_dim):
        return False
    return fuse(runner.layers, runner.first_top, runner.own_hooks)


@torch.no_grad()
def fuse_streams(runner: Any) -> None:
    """The same for the layers that streams run through alone, which are the runner's own whatever its passes run through."""
    layers = runner.stream_layers
    if any(part._forward_hooks for part in layers.modules()):  # adapters that are not merged into the weights
        return
    for name, module in list(layers.named_modules()):
        if (norm := fused(module)) is not None:
            put(layers, name, norm)
    if not fuse(layers):
        return
    cache, ids = RowCache(len(runner.layers)), torch.arange(1, 9, device=input_device(runner.model))[None] % runner.text_config.vocab_size
    entry, _ = runner.observe(ids, cache)
    cache.keep(range(8))
    last, seen = torch.tensor([[7]], device=entry.device), torch.ones(1, 1, 8, dtype=torch.bool, device=entry.device)
    found = []
    for runner.fused_streams in (False, True):
        found.append(runner.speculate(entry[:, -1:], last, seen, cache).float())
    served = all(run.passes for run in runs_of(layers))
    if not served or not (found[1] - found[0]).std() < _ALIKE * found[0].std():
        runner.fused_streams = False
        for layer in layers:
            layer.__dict__.pop("forward", None)


def fuse(layers: nn.ModuleList, first_top: int = 0, own_hooks: int = 0) -> bool:
    """From now on these layers, which nobody else may call, go the short way where they can; False, and nothing is done, unless all of
    them look as if they could, and nobody else listens to one.

    The first of them does the work of all, and so does the one of number `first_top`, whose input is asked for, for those from it on.

    Args:
        own_hooks: how many hooks of theirs are the runner's.
    """
    layer: Any
    if sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in layers) != own_hooks:
        return False
    found = [FusedLayer.of(layer) for layer in layers]
    fused = [each for each in found if each is not None]
    if len(fused) < len(layers) or len({each.sizes for each in fused}) != 1:
        return False
    numbers: list[Any] = [layer.self_attn.layer_idx for layer in layers]  # type: ignore[union-attr]
    for number, layer in enumerate(layers):
        run, end = None, first_top if number < first_top else len(layers)
        if number in (0, first_top):
            run = Run(FusedLayers(fused[number:end]), numbers[number:end], end)
        layer.forward = _shortened(layer.forward, number, run)
    return True


class Run:
    """Layers that are done by the first of them; numbers: theirs in the cache; end: of the list that they stand in, the one behind them.

    Attributes:
        passes: in which they were.
    """

    def __init__(self, layers: FusedLayers, numbers: list[int], end: int) -> None:
        self.layers, self.numbers, self.end, self.passes = layers, numbers, end, 0
        like = layers.like
        self._like = torch.empty(1, like.kv_heads, 0, like.head_dim, dtype=like.dtype)

    def serves(self, plan: Pass | None, hidden: torch.Tensor, turned: Any) -> bool:
        """Whether a pass is such that they can be."""
        if plan is None or plan.paths is None or plan.begin is not None or not isinstance(plan.cache, RowCache):
            return False
        if not isinstance(turned, tuple) or len(turned) != 2:
            return False
        like, (cos, _) = self.layers.like, turned
        fits = hidden.dtype is cos.dtype is like.dtype and cos.shape == (1, hidden.shape[1], like.head_dim)
        return fits and plan.cache.keep_from <= self.numbers[0]

    def __call__(self, plan: Any, hidden: torch.Tensor, turned: Any) -> torch.Tensor | None:
        """None if numbers were not finite: then this pass goes through the layers themselves from here on."""
        self.passes += 1
        cos, sin = (each.contiguous() for each in turned)
        stores = plan.cache.room(self.numbers, hidden.shape[1], self._like)
        found = self.layers(hidden.contiguous(), cos, sin, stores, plan.cache.length, plan.paths.tensors)
        if found is None:
            plan.paths = None
        return found


def runs_of(layers: nn.ModuleList) -> list[Run]:
    """What does the work of these layers, where they are fused."""
    return [run for layer in layers if (run := getattr(layer.forward, "run", None)) is not None]


def _shortened(forward: Any, number: int, run: Run | None) -> Any:
    """A layer's forward: with those behind it if the pass is such that they can be done so, or nothing if they were.

    run: None if it is not the first.
    """

    def short(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan, turned = PASS.get(), kwargs.get("position_embeddings")
        if plan is not None and number < plan.done:
            return hidden_states
        if run is None or args or not run.serves(plan, hidden_states, turned):
            return forward(hidden_states, *args, **kwargs)
        if (found := run(plan, hidden_states, turned)) is None:
            return forward(hidden_states, *args, **kwargs)
        plan.done = run.end  # type: ignore[union-attr]
        return found

    short.run = run  # type: ignore[attr-defined]
    return short
