"""An adapter meets its base: whether they belong together, and a fresh one that does.

Knows: shapes and names. Does not know: passes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..base.fingerprint import fingerprint
from ..base.layers import find_projections
from ..errors import NotOfThisBase, UsageError
from .config import AdapterConfig
from .weights import StreamAdapter


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


def new_adapter(
    model: PreTrainedModel, config: AdapterConfig, tokenizer: Any = None, draft_ids: torch.Tensor | None = None
) -> StreamAdapter:
    """A fresh, untrained adapter that fits `model`; without `draft_ids`, `[draft_vocab_size]`, all tokens may be drafted."""
    return StreamAdapter(
        replace(config, draft_vocab_size=0) if draft_ids is None else config,
        model.config.get_text_config().hidden_size,
        find_projections(model, config.num_msa_layers),
        draft_ids,
        {"name": model.config.name_or_path, "fingerprint": fingerprint(model, tokenizer)},
    )
