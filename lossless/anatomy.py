"""Where a base keeps its parts: the decoder, its layers, their projections.

Knows: how to find them in any decoder-only HF model. Does not know: what is done with them.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import UsageError

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layer_norm", "norm_f")


def decoder(model: PreTrainedModel) -> Any:
    """The base without its LM head."""
    return model.get_decoder()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The base's decoder layers.

    Raises:
        UsageError: there is no list of `num_hidden_layers` layers in the decoder.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for child in decoder(model).children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return child
    raise UsageError(f"{type(model).__name__} has no list of {depth} decoder layers that streams could enter")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last decoder layer and the LM head."""
    for name in _FINAL_NORMS:
        if isinstance(found := getattr(decoder(model), name, None), nn.Module):
            return found
    raise UsageError(f"{type(model).__name__} has no final norm by a name that is known ({', '.join(_FINAL_NORMS)})")


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the layers' attention is chosen by name, so that another can be put in its place."""
    return hasattr(sys.modules[type(decoder_layers(model)[0]).__module__], "ALL_ATTENTION_FUNCTIONS")


def find_projections(model: PreTrainedModel, num_msa_layers: int) -> dict[str, tuple[int, int]]:
    """The linear projections of the top layers: `<layer from N - N_s>.<path>` -> (in, out features)."""
    layers = decoder_layers(model)
    if not 1 <= num_msa_layers <= len(layers):
        raise UsageError(f"num_msa_layers must be between 1 and {len(layers)} (model depth), got {num_msa_layers}")
    top = layers[len(layers) - num_msa_layers :]
    return {
        f"{i}.{path}": (module.in_features, module.out_features)
        for i, layer in enumerate(top)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
