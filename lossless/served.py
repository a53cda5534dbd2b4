"""Which calls of `generate` are served here, and which go to the base's own loop.

Knows: what cannot be drafted for, and what a batch cannot do when each of its texts is chosen for alone.
Does not know: how calls are served.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMode

from .anatomy import counts_padding, shares_position_bias

# arguments of generate() that are not fields of a generation config
_CALL_ARGUMENTS = frozenset(
    ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
     "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate",
     "tokenizer", "assistant_tokenizer", "input_ids", "inputs_embeds", "past_key_values")
)  # fmt: skip

# HF's processors and criteria that look beyond the row that they are given
_ACROSS_ROWS = ("EncoderNoRepeatNGram", "EncoderRepetitionPenalty", "SynthID", "UnbatchedClassifierFree")


def not_served(model: Any, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why this call must go to the base, if it must."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if kwargs.get("inputs_embeds") is not None:
        if ids is not None:
            return "input_ids and inputs_embeds were both given"
    elif not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] == 0:
        return "the prompt is not given as input_ids of shape [batch, length]"
    for name in ("assistant_model", "custom_generate", "negative_prompt_ids"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if (past := kwargs.get("past_key_values")) is not None and (
        not isinstance(past, DynamicCache) or any(type(layer) is not DynamicLayer for layer in past.layers)
    ):
        return "past_key_values is not a DynamicCache that keeps every row"
    options = {k: v for k, v in kwargs.items() if k not in _CALL_ARGUMENTS}
    prepared = model._prepare_generation_config(kwargs.get("generation_config"), **options)
    config: GenerationConfig = prepared[0]
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the generation mode {mode.value}"
    for name in ("output_attentions", "output_hidden_states", "cache_implementation"):
        if getattr(config, name, None):
            return f"{name} was set"
    if config.guidance_scale not in (None, 1, 1.0) or config.use_cache is False or config.prefill_chunk_size:
        return "guidance_scale, prefill_chunk_size or use_cache=False was set"
    return None


def not_served_in_a_batch(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    streamer: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    attention_mask: torch.Tensor | None = None,
    **model_kwargs: Any,
) -> str | None:
    """Why a batch, as HF prepared it, must go to HF's own loop, if it must: here each text is chosen for alone."""
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        return "a prompt that is padded on the right"
    if attention_mask is not None and not bool(attention_mask.all()) and counts_padding(model):
        return "a padded prompt for a base that takes no position_ids"
    if len(input_ids) == 1:
        return None
    if (past := model_kwargs.get("past_key_values")) is not None and past.get_seq_length():
        return "a passed-in cache for a batch"
    if shares_position_bias(model):
        return "a batch for a base whose position bias is one for all texts"
    if streamer is not None:
        return "a streamer for a batch"
    if generation_config.return_dict_in_generate:
        return "return_dict_in_generate for a batch"
    for part in (*logits_processor, *stopping_criteria):
        name = type(part).__name__
        if not type(part).__module__.startswith("transformers.") or name.startswith(_ACROSS_ROWS):
            return f"{name} for a batch"
    if not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria) and len(stopping_criteria) > 1:
        return "stopping criteria without an EOS token for a batch"
    return None
