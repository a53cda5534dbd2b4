"""The layers that streams run through alone: copies of the base's top layers, with the MSA adapters in them.

Knows: where weights are merged, and what that may take. Does not know: passes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter.weights import StreamAdapter
from ..base.layers import device_of
from ..base.linears import draft_itemsize, draft_linear
from ..base.packed import dense, product_dtype, put
from ..base.structure import structure_of
from ..kernels.pages import together
from .hooks import adapt, turn_values

_ALWAYS = 64 * 2**20  # bytes that a copy of the top layers' projections may take in any case


def stream_layers(top: nn.ModuleList, adapter: StreamAdapter, weights: nn.ModuleList, base_bytes: int) -> nn.ModuleList:
    """Layers for streams that run alone: a copy of the base's top layers, each projection W + B A in one product where that is to be
    had, else over the base's own weights, with the adapters hooked into it.

    In a small model the many small products of the adapters take as long as the layers themselves, and a copy of the top
    layers' weights is little. Drafts may be wrong, so the products are the cheapest ones.

    Args:
        top: those that passes run through; weights: the same with weights that may be easier to read, the base's own.
        base_bytes: what the base's weights take; the copy takes at most an eighth of that.
    """
    layers = structure_of(top)
    projections: dict[str, Any] = {name: layers.get_submodule(name) for name, _ in adapter.adapters()}
    learning = any(parameter.requires_grad for parameter in adapter.parameters())
    needed: int | None = 0
    for name, low_rank in adapter.adapters():
        dtype = product_dtype(projections[name])
        if dtype is None or needed is None:
            needed = None
        else:
            needed += low_rank.shape[0] * low_rank.shape[1] * draft_itemsize(device_of(projections[name]), dtype)
    if learning or needed is None or needed > max(_ALWAYS, base_bytes // 8):
        adapt(layers, adapter)
        return layers
    with together():
        for name, low_rank in adapter.adapters():
            weight, bias = dense(weights.get_submodule(name))  # type: ignore[misc]
            put(layers, name, draft_linear(low_rank.merged_into(weight), bias, weight.dtype))
    turn_values(layers, adapter)
    return layers
