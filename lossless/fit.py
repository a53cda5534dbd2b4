"""An adapter meets its base: whether they belong together, a fresh one that does, and the top layers' weights with it in them.

Knows: shapes and names. Does not know: passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapter import StreamAdapter
from .anatomy import find_projections
from .config import StreamingConfig
from .errors import NotOfThisBase, UsageError
from .models import fingerprint

_MERGED_BYTES = 64 * 2**20  # most that a copy of the top layers' projections may take


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
    if ids is not None and int(ids.max()) >= text_config.vocab_size:
        raise UsageError(
            f"the adapter drafts token {int(ids.max())}, the model's vocabulary ends at "
            f"{text_config.vocab_size - 1}: it belongs to another model"
        )


def merged_weights(adapter: StreamAdapter, projections: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """For each top layer, W + B A of its adapted projections, for streams that run alone; empty if not to be had.

    In a small model the many small products of the adapters take as long as the layers themselves, and a
    copy of the top layers' weights is little. The base's own weights stay as they are.
    """
    if any(parameter.requires_grad for parameter in adapter.parameters()):
        return []
    if any(type(p) is not nn.Linear or p.weight.is_meta for p in projections.values()):  # quantized, offloaded
        return []
    if sum(p.weight.numel() * p.weight.element_size() for p in projections.values()) > _MERGED_BYTES:
        return []
    merged: list[dict[str, torch.Tensor]] = [{} for _ in range(adapter.config.num_msa_layers)]
    for name, low_rank in adapter.adapters():
        index, path = name.split(".", 1)
        merged[int(index)][f"{path}.weight"] = low_rank.merged_into(projections[name].weight.detach())
    return merged


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
