"""An adapter meets its base: whether they belong together, a fresh one that does, and the layers that streams run through alone.

Knows: shapes, names, and where weights are merged. Does not know: passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..base.layers import device_of, find_projections
from ..base.linears import draft_itemsize, draft_linear
from ..base.loading import fingerprint
from ..base.packed import dense, product_dtype
from ..base.structure import structure_of
from ..config import StreamingConfig
from ..errors import NotOfThisBase, UsageError
from ..streams.passes import adapt, turn_values
from .weights import StreamAdapter

_ALWAYS = 64 * 2**20  # bytes that a copy of the top layers' projections may take in any case


def check_fit(model: Any, adapter: StreamAdapter) -> None:
    """Raises UsageError if the adapter is another model's, or the base has no place for a part of it."""
    text_config = model.config.get_text_config()
    dim, expected = text_config.hidden_size, find_projections(model, adapter.config.num_msa_layers)
    if (width := model.get_input_embeddings().weight.shape[1]) != dim:
        raise UsageError(
            f"{type(model).__name__} cannot be accelerated: its token embeddings ({width}) are of another "
            f"width than its hidden states ({dim})"
        )
    if adapter.dim != dim:
        raise UsageError(
            f"the adapter is for hidden states of width {adapter.dim}, "
            f"the model's are {dim} wide: it belongs to another model"
        )
    found = adapter.projections()
    if found != expected:
        odd = sorted(found.items() ^ expected.items())[0]
        raise UsageError(f"the adapter's projections are not the model's (first: {odd}): it belongs to another model")
    if adapter.config.rotate_values and not any(name.endswith("v_proj") for name in found):
        raise NotOfThisBase(f"rotate_values needs layers with a value projection of their own, {type(model).__name__} has none")
    ids = adapter.draft_ids
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < text_config.vocab_size:
        raise UsageError(
            f"the adapter drafts token {int(ids.min() if ids.min() < 0 else ids.max())}, the model's vocabulary ends at "
            f"{text_config.vocab_size - 1}: it belongs to another model, or is broken"
        )


def stream_layers(top: nn.ModuleList, adapter: StreamAdapter, base_bytes: int) -> nn.ModuleList:
    """Layers for streams that run alone: a copy of the base's top layers, each projection W + B A in one product where that is to be
    had, else over the base's own weights, with the adapters hooked into it.

    In a small model the many small products of the adapters take as long as the layers themselves, and a copy of the top
    layers' weights is little. Drafts may be wrong, so the products are the cheapest ones.

    Args:
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
    for name, low_rank in adapter.adapters():
        weight, bias = dense(projections[name])  # type: ignore[misc]
        parent, _, own = name.rpartition(".")
        setattr(layers.get_submodule(parent), own, draft_linear(low_rank.merged_into(weight), bias))
    turn_values(layers, adapter)
    return layers


def new_adapter(
    model: PreTrainedModel, config: StreamingConfig, tokenizer: Any = None, draft_ids: torch.Tensor | None = None
) -> StreamAdapter:
    """A fresh, untrained adapter that fits `model`."""
    return StreamAdapter(
        config,
        model.config.get_text_config().hidden_size,
        find_projections(model, config.num_msa_layers),
        draft_ids,
        {"name": model.config.name_or_path, "fingerprint": fingerprint(model, tokenizer)},
    )
