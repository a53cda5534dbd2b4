"""Which calls of `generate` are served here, which go to the base's own loop, and that a base serves one at a time.

Knows: what cannot be drafted for, and what a batch cannot do when each of its texts is chosen for alone.
Does not know: how calls are served.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import (
    GenerationMode,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..base.layers import (
    CACHE,
    cache_among,
    counts_padding,
    decoder,
    rotary_turns,
    shares_position_bias,
    shortest_window,
)
from .conditions import under_autocast

# arguments of generate() that are not fields of a generation config
_CALL_ARGUMENTS = frozenset(
    ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
     "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate",
     "tokenizer", "assistant_tokenizer", "input_ids", "inputs_embeds", "past_key_values", CACHE)
)  # fmt: skip

# HF's processors and criteria that look beyond the row that they are given
_ACROSS_ROWS = ("EncoderNoRepeatNGram", "EncoderRepetitionPenalty", "SynthID", "UnbatchedClassifierFree")

_REMEMBERING = ("SynthID", "UnbatchedClassifierFree")  # of those, the ones that change with each call
_OF_THE_SPREAD = ("TypicalLogits", "EtaLogits", "TopHLogits")  # a likelier token may be cut off, and any logit moves the cut: no guard covers that


def fallback_reason(model: Any, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why this call must go to the base, if it must."""
    if under_autocast(model):
        return "autocast is on"
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if kwargs.get("inputs_embeds") is not None:
        if ids is not None:
            return "input_ids and inputs_embeds were both given"
    elif not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] == 0:
        return "the prompt is not given as input_ids of shape [batch, length]"
    rows, mask = kwargs["inputs_embeds"] if ids is None else ids, kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape[:1] != rows.shape[:1]:
        return "an attention mask for another number of prompts"
    if not isinstance(kwargs.get("stopping_criteria"), list | tuple | None):
        return "stopping_criteria is not a list"
    for name in ("assistant_model", "custom_generate", "negative_prompt_ids"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if (past := cache_among(kwargs)) is not None and (
        type(past) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in past.layers)
    ):
        return "past_key_values is not a DynamicCache that keeps every row"
    config, given = _prepared(model, kwargs)
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the generation mode {mode.value}"
    for name in ("output_attentions", "output_hidden_states", "cache_implementation", "token_healing"):
        if getattr(config, name, None):
            return f"{name} was set"
    for name, value in given.items():  # what is left is meant for the base's forward
        if value is not None and name != "attention_mask":
            return f"{name} was given"
    if config.guidance_scale not in (None, 1, 1.0) or config.use_cache is False or config.prefill_chunk_size:
        return "guidance_scale, prefill_chunk_size or use_cache=False was set"
    return None


def _prepared(model: Any, kwargs: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation config of a call, and what of its arguments is left for the base's forward."""
    options = {name: value for name, value in kwargs.items() if name not in _CALL_ARGUMENTS}
    found: tuple[GenerationConfig, dict[str, Any]] = model._prepare_generation_config(kwargs.get("generation_config"), **options)
    return found


def exactness(best: str, texts: int, padded: bool) -> str:
    """What holds for a call where `best` does at best: attention of padded rows takes a mask, and no row is read without."""
    if texts > 1:
        return "off"
    return "near-tie" if padded and best == "bitwise" else best


def fallback_reason_as_prepared(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    streamer: Any,
    ahead: int,
    exact: str,
    passed_in: bool,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **model_kwargs: Any,
) -> str | None:
    """Why a call, as HF prepared it, must go to HF's own loop, if it must.

    Args:
        ahead: places behind a text's end that streams stand at.
        exact: what holds at best; under `near-tie` a processor may be asked twice about a position.
        passed_in: the cache is the caller's, and is to be handed back.
    """
    padded = False
    rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    past = cache_among(model_kwargs)
    held = 0 if past is None else past.get_seq_length()
    width = getattr(generation_config, "_mask_length", rows) if attention_mask is None else attention_mask.shape[-1]
    if not held and width != rows:
        return "an attention mask of another length than the prompt"
    if held and (held >= width or (rows != width and (rows != width - held or inputs_embeds is not None))):
        return "a passed-in cache that is not of the beginning of the prompt"
    if attention_mask is not None:
        seen = attention_mask != 0
        padded = not bool(seen.all())
        if seen.ndim != 2 or bool((seen[:, 1:] < seen[:, :-1]).any()) or not bool(seen[:, -1].all()):
            return "a prompt that is padded elsewhere than on the left"
        if padded and counts_padding(model):
            return "a padded prompt for a base that takes no position_ids"
    prompt = (attention_mask if attention_mask is not None else inputs_embeds if inputs_embeds is not None else input_ids).shape[1]
    prompt = max(prompt, getattr(generation_config, "_mask_length", 0))  # of a mask of ones that HF left out
    longest = prompt + generation_config.max_length - input_ids.shape[1] + ahead
    if any(longest > turn and (prompt <= turn or again) for turn, again in rotary_turns(model)):
        return "a text that may outgrow the length from which on this base turns its positions otherwise"
    if len(input_ids) == 1:
        window = shortest_window(model)
        if padded and window is not None and longest - ahead > window:  # its rows see masked keys, and how many rounds them
            return "a padded prompt for a base whose layers look back over a window"
        remembering = next((type(part).__name__ for part in logits_processor if _may_remember(part)), None)
        if remembering and exactness(exact, 1, padded) == "near-tie":
            return f"{remembering}, a processor that may remember what it was asked, under near-tie"
        spread = next((name for part in logits_processor if (name := type(part).__name__).startswith(_OF_THE_SPREAD)), None)
        if spread and exactness(exact, 1, padded) == "near-tie":
            return f"{spread}, which cuts off by the entropy of all logits, under near-tie"
        return None
    if any(isinstance(part, PrefixConstrainedLogitsProcessor) and part._num_beams > 1 for part in logits_processor):
        return "several answers to a prompt under a prefix_allowed_tokens_fn, which this version of transformers asks about all of them together"
    # texts of a batch are chosen for one by one
    if passed_in:
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


def _may_remember(processor: Any) -> bool:
    """Whether it may answer otherwise when it is asked again: grammars go on by one token with each call. HF's own do not, but for two."""
    kind = type(processor)
    return not kind.__module__.startswith("transformers.") or kind.__name__.startswith(_REMEMBERING)


class BaseLock:
    """A base serves one call at a time, whatever is attached to it, and none within another."""

    def __init__(self) -> None:
        self.lock, self.serving = threading.RLock(), False


_LOCKS: WeakKeyDictionary[Any, BaseLock] = WeakKeyDictionary()


def lock_of(model: PreTrainedModel) -> BaseLock:
    """The one of this base, whatever wraps it."""
    return _LOCKS.setdefault(decoder(model), BaseLock())


def with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the criterion for its stop strings in place of them.

    HF drops the tokenizer on its way to a custom loop, and then cannot make that criterion.
    """
    if (tokenizer := kwargs.get("tokenizer")) is None or (strings := _prepared(model, kwargs)[0].stop_strings) is None:
        return kwargs
    criteria = list(kwargs.get("stopping_criteria") or ())
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # HF, too, takes the caller's own then
        criteria.insert(0, StopStringCriteria(tokenizer, strings))
    return kwargs | {"stop_strings": None, "stopping_criteria": StoppingCriteriaList(criteria)}
