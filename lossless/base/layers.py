"""Where a base keeps its parts: the decoder, its layers, their projections, their biases by position.

Knows: how to find them in any decoder-only HF model, with the few names that differ between families.
Does not know: what is done with them.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.pytorch_utils import Conv1D

from ..errors import NotOfThisBase, UsageError
from .linears import FourBitLinear, PackedLinear

# what transformers calls a cache of keys and values, as an argument and as an output: another name from 5.24 on
CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layer_norm", "norm_f")
_ROUTED = frozenset(("experts", "router", "gate", "shared_expert_gate"))  # parts that see some rows, or judge them
_STATEFUL = ("linear_attention", "mamba", "conv", "recurrent", "hybrid", "ssm")  # kinds of layers that carry a state on
_HIDDEN_IS_TRUE = frozenset(("MptBlock",))  # layers whose boolean mask names the keys that are not seen


def refuse_what_keeps_a_state(model: PreTrainedModel) -> None:
    """Raises UsageError for a base whose layers carry a state from row to row: it cannot take a draft back."""
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    carrying = sorted(kind for kind in kinds if any(word in kind for word in _STATEFUL))
    if getattr(model, "_is_stateful", False) or carrying:
        raise UsageError(
            f"{name} keeps a running state ({', '.join(carrying) or 'recurrent layers'}) that cannot be rolled "
            f"back when a draft is rejected: only models whose layers are all attention can be accelerated"
        )
    if model.config.is_encoder_decoder:
        raise UsageError(f"{name} is an encoder-decoder: only decoder-only models can be accelerated")


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; Accelerate may keep its weights elsewhere."""
    if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
        return torch.device(device)
    held = next(module.parameters(), None)
    return torch.device("cpu") if held is None else held.device  # packed weights are no parameters


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the base takes token ids."""
    return device_of(model.get_input_embeddings())


def depth(model: PreTrainedModel) -> int:
    """How many decoder layers the base has."""
    return int(model.config.get_text_config().num_hidden_layers)


def context_limit(model: Any) -> int | None:
    """The tokens that the model was made for, None if it does not say."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "max_target_positions")]  # MPT's, Whisper's
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def decoder(model: PreTrainedModel) -> Any:
    """The base without its LM head: the module that holds the list of decoder layers.

    Raises:
        UsageError: no module has a list of `num_hidden_layers` layers.
    """
    kinds = type(model.config), type(model.config.get_text_config())
    for module in (model.get_decoder(), *model.modules()):
        if not isinstance(getattr(module, "config", model.config), kinds):
            continue  # what reads pictures or sound may be as deep
        if any(isinstance(child, nn.ModuleList) and len(child) == depth(model) for child in module.children()):
            return module
    raise UsageError(f"{type(model).__name__} has no list of {depth(model)} decoder layers that streams could enter")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The base's decoder layers; raises as `decoder` does."""
    children = decoder(model).children()
    return next(child for child in children if isinstance(child, nn.ModuleList) and len(child) == depth(model))


def after_layers(model: PreTrainedModel) -> list[nn.Module]:
    """What stands between the last decoder layer and the LM head, in order: a norm, and in OPT a projection."""
    whole = decoder(model)
    norm = next((m for name in _FINAL_NORMS if isinstance(m := getattr(whole, name, None), nn.Module)), None)
    return [part for part in (norm, getattr(whole, "project_out", None)) if part is not None]


def rotaries(model: PreTrainedModel) -> list[nn.Module]:
    """What makes position embeddings for all layers: modules beside them, one or one for each base frequency."""
    beside = [part for child in decoder(model).children() for part in (child if isinstance(child, nn.ModuleList) else [child])]
    return [part for part in beside if "Rotary" in type(part).__name__]


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the layers' attention is chosen by name, so that another can be put in its place."""
    return hasattr(sys.modules[type(decoder_layers(model)[0]).__module__], "ALL_ATTENTION_FUNCTIONS")


def refuse_other_rows(model: PreTrainedModel, hidden: torch.Tensor, batch: int, rows: int) -> None:
    """Raises UsageError if what a layer is given is not `[batch, rows, width]`: streams would join the wrong dimension."""
    if hidden.ndim != 3 or hidden.shape[:2] != (batch, rows):
        raise UsageError(
            f"{type(model).__name__} cannot be accelerated: its layers must take hidden states of the shape [batch, rows, width], "
            f"got {list(hidden.shape)} for batch {batch} and {rows} rows"
        )


def refuse_tensors_of_its_own(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Raises UsageError if a layer is given a tensor that nobody here can make for other rows or other batches (X-MOD's languages)."""
    if odd := next((name for name, value in given.items() if isinstance(value, torch.Tensor)), None):
        raise UsageError(f"{type(model).__name__} cannot be accelerated: its layers take a tensor of their own for each text, {odd}")


def hides_where_true(layer: nn.Module) -> bool:
    """Whether a layer whose attention is its own takes a boolean mask, True for the keys that are not seen."""
    return type(layer).__name__ in _HIDDEN_IS_TRUE


def shares_position_bias(model: PreTrainedModel) -> bool:
    """Whether a base with ALiBi has one bias for all texts of a batch, wherever each of them stands (MPT)."""
    return hasattr(decoder(model), "build_mpt_alibi_tensor")


def counts_padding(model: PreTrainedModel) -> bool:
    """Whether places in a text padded on the left are counted from the padding on: nobody tells the base otherwise."""
    return not takes_positions(model) and not hasattr(decoder(model), "build_alibi_tensor")


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a base can be told which place in its text each row has."""
    return "position_ids" in inspect.signature(model.forward).parameters


def as_generating(model: PreTrainedModel, ids: torch.Tensor, past: int = 0) -> dict[str, torch.Tensor]:
    """What HF's own loop gives a base to read `[1, rows]` tokens behind `past` others: it counts places from 0, even for those bases that
    count from elsewhere if nobody tells them (RoBERTa)."""
    places = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    return {"input_ids": ids} | ({"position_ids": places} if takes_positions(model) else {})


def cache_among(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, by either name."""
    found = arguments.get(CACHE)
    return arguments.get("past_key_values") if found is None else found


def as_decoding(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """What HF's own loop enters behind the prefill: on some devices experts go about rows of one in another way."""
    inner: Any = model
    found: contextlib.AbstractContextManager[None] = inner._optimize_model_for_decode()
    return found


def rotary_turns(model: PreTrainedModel) -> list[tuple[int, bool]]:
    """Lengths of a text from which on the base computes its rotary positions otherwise (dynamic, longrope): none for most;
    and whether they go on changing with each further token."""
    config: Any = model.config.get_text_config()
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [kind for kind in parameters.values() if isinstance(kind, dict)]
    return [
        (kind.get("original_max_position_embeddings") or config.max_position_embeddings, kind["rope_type"] != "longrope")
        for kind in by_layer_type or [parameters]
        if "dynamic" in kind.get("rope_type", "") or kind.get("rope_type") == "longrope"
    ]


def position_bias(model: PreTrainedModel, length: int) -> torch.Tensor:
    """`[heads, length]`, what a base with ALiBi adds to the scores of the keys at each place.

    Raises:
        UsageError: its bias is another one.
    """
    whole, device = decoder(model), input_device(model)
    if shares_position_bias(model):
        return whole.build_mpt_alibi_tensor(whole.num_heads, length, device=device)[:, 0]
    if not hasattr(whole, "build_alibi_tensor"):
        raise UsageError(f"{type(model).__name__} cannot be accelerated: it adds a position bias to attention scores by a rule of its own, not ALiBi")
    ones = torch.ones(1, length, device=device)
    return whole.build_alibi_tensor(ones, whole.num_heads, model.get_input_embeddings().weight.dtype)[:, 0]


def column_masks(layer: nn.Module) -> list[nn.Module]:
    """Attention modules of a layer that mask by column with a square boolean buffer of their own, named `bias`."""
    found = [(module, getattr(module, "bias", None)) for module in layer.modules()]
    return [
        module for module, bias in found
        if isinstance(bias, torch.Tensor) and bias.dtype == torch.bool and bias.ndim == 4 and bias.shape[2] == bias.shape[3]
    ]  # fmt: skip


def own_window(layer: nn.Module) -> int | None:
    """The sliding window of a layer that masks by column; None if it sees everything."""
    for module in column_masks(layer):
        mask: Any = module.bias
        if (seen := int(mask[0, 0, -1].sum())) < mask.shape[3]:
            return seen
    return None


def shortest_window(model: PreTrainedModel) -> int | None:
    """The fewest places that any layer looks back over; None if all look back at everything."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    found = [own_window(layer) for layer in decoder_layers(model)]
    if kinds is None or "sliding_attention" in kinds:
        found.append(getattr(config, "sliding_window", None))
    if kinds is not None and "chunked_attention" in kinds:
        found.append(getattr(config, "attention_chunk_size", None))
    return min((window for window in found if isinstance(window, int)), default=None)


def is_projection(module: nn.Module) -> bool:
    """Whether it multiplies rows with a matrix and does nothing else (some routers are linear, and then choose)."""
    return isinstance(module, nn.Linear | Conv1D | PackedLinear | FourBitLinear) and "Router" not in type(module).__name__


def find_projections(model: PreTrainedModel, num_msa_layers: int) -> dict[str, tuple[int, int]]:
    """The linear projections that every row of the top layers passes: `<layer from N - N_s>.<path>` -> (in, out).

    Experts and routers are left out: which rows an expert sees is for the router to say.
    """
    refuse_what_keeps_a_state(model)
    layers = decoder_layers(model)
    if not 1 <= num_msa_layers <= len(layers):
        raise NotOfThisBase(f"num_msa_layers must be between 1 and {len(layers)} (model depth), got {num_msa_layers}")
    return {
        f"{i}.{path}": features(module)
        for i, layer in enumerate(layers[len(layers) - num_msa_layers :])
        for path, module in layer.named_modules()
        if is_projection(module)
        and not _ROUTED & set(path.split("."))
    }


def features(projection: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear projection."""
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features  # type: ignore[return-value]
