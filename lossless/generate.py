"""The decode loop, and the `generate()` wrapper around it.

Knows: the order of things: draft, verify, accept, keep. HF's own `generate` prepares the config, the
logits processors, the stopping criteria and the inputs, and calls the loop in place of its own
(`custom_generate`). Does not know: how trees are grown or streams computed.
"""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .adapter import StreamAdapter
from .anatomy import find_projections
from .cache import RowCache
from .config import StreamingConfig
from .draft import Drafter
from .errors import UsageError
from .lookup import TextMemory
from .models import fingerprint
from .streams import PassOutput, StreamRunner
from .tree import DraftTree
from .verification import walk

OVERRIDES = frozenset(("tree_nodes", "schedule", "recall"))  # fields of an adapter's config that a session may change


@dataclass
class Stats:
    """What the last `generate` did. The prefill and the token it yields are counted apart.

    Attributes:
        tokens: emitted tokens.
        target_passes: passes of the base after the prefill.
        drafted: nodes proposed, roots not counted.
        accepted: how many passes emitted 1, 2, 3, ... tokens.
        prefill_s, decode_s: wall-clock seconds.
        served: False if the call was handed to the base's own generate.
    """

    tokens: int = 0
    target_passes: int = 0
    drafted: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    served: bool = True

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens per target pass."""
        return (self.tokens - 1) / self.target_passes if self.target_passes else 1.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, the prefill not counted."""
        return (self.tokens - 1) / self.decode_s if self.decode_s else 0.0

    def __str__(self) -> str:
        if not self.served:
            return "not accelerated: handed to the base's own generate"
        return (
            f"{self.tokens} tokens, {self.target_passes} target passes, acceptance length "
            f"{self.acceptance_length:.2f}, {self.tokens_per_s:.1f} tokens/s"
        )


class AcceleratedModel:
    """A frozen model with an adapter attached; made by `accelerate`.

    `generate` takes what `model.generate` takes and returns the same tokens. Everything else is the
    base's own: attributes that this class does not have are looked up there. The base itself is
    untouched outside a call of `generate`; one call runs at a time.
    """

    def __init__(self, model: PreTrainedModel, adapter: StreamAdapter) -> None:
        self.base: Any = model
        self.adapter = adapter
        compute_dtype: Any = model.get_input_embeddings().weight.dtype
        self.runner = StreamRunner(model, adapter.copy_as(model.device, compute_dtype))
        self.drafter = Drafter(self.runner.adapter, model.get_input_embeddings(), model.get_output_embeddings())
        self.tree_nodes = adapter.config.tree_nodes
        self.schedule = adapter.config.schedule
        self.recall = adapter.config.recall
        self.stats = Stats()
        self._lock = threading.RLock()
        self._warned: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not yet set: a broken copy must not recurse
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def detach(self) -> PreTrainedModel:
        """The base, as it was."""
        return self.base

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As `model.generate`: same arguments, same result, same random numbers drawn.

        What is not served yet (more than one sequence, beams, assistants, padded prompts, stop strings,
        `inputs_embeds`, a passed-in cache, attentions or hidden states as output) goes to the base's own
        `generate`, with one warning for each reason.
        """
        self.stats = Stats()
        if reason := self._not_served(inputs, kwargs):
            if reason not in self._warned:
                self._warned.add(reason)
                warnings.warn(f"not accelerated: {reason}; the base's own generate answers", stacklevel=2)
            self.stats.served = False
            return self.base.generate(inputs, **kwargs)
        streamer = kwargs.get("streamer")

        def decode(model: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Any:
            # HF drops the streamer on its way to a custom loop, so it is bound here
            return self._decode(input_ids, streamer=streamer, **prepared)

        with self._lock, self.runner.installed():
            return self.base.generate(inputs, custom_generate=decode, **kwargs)

    def _not_served(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """Why this call must go to the base, if it must."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] == 0:
            return "the prompt is not given as input_ids of shape [1, length]"
        if ids.shape[0] != 1:
            return f"a batch of {ids.shape[0]}"
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool((mask == 1).all()):
            return "a padded or masked prompt"
        for name in ("assistant_model", "custom_generate", "past_key_values", "inputs_embeds", "negative_prompt_ids"):
            if kwargs.get(name) is not None:
                return f"{name} was given"
        options = {k: v for k, v in kwargs.items() if k not in _CALL_ARGUMENTS}
        prepared = self.base._prepare_generation_config(kwargs.get("generation_config"), **options)
        config: GenerationConfig = prepared[0]
        if mask is None and self._reads_padding(ids, config):
            return "a prompt that holds the padding token, without an attention mask"
        mode = config.get_generation_mode(None)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"the generation mode {mode.value}"
        if (config.num_return_sequences or 1) != 1:
            return f"num_return_sequences={config.num_return_sequences}"
        for name in ("stop_strings", "output_attentions", "output_hidden_states", "cache_implementation"):
            if getattr(config, name, None):
                return f"{name} was set"
        if config.guidance_scale not in (None, 1, 1.0) or config.use_cache is False:
            return "guidance_scale or use_cache=False was set"
        return None

    def _reads_padding(self, ids: torch.Tensor, config: GenerationConfig) -> bool:
        """Whether HF would infer from the prompt's tokens that some of them are padding."""
        pad, eos = config.pad_token_id, config.eos_token_id
        eos_ids = eos if isinstance(eos, list) else [eos]
        return pad is not None and pad not in eos_ids and bool((ids == pad).any())

    def _decode(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The loop that stands in for `GenerationMixin._sample`; `input_ids` is `[1, prompt]`."""
        memory = TextMemory(input_ids[0].tolist()) if self.recall else None
        text = _Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer, memory)
        cache = RowCache(len(self.runner.layers), input_ids.shape[1] + 256)

        # 1. prefill: the prompt's last row gives the first token and speculates
        started = time.perf_counter()
        out = self._pass(input_ids, torch.arange(input_ids.shape[1])[None], None, cache, prefill=True)
        cache.keep(range(input_ids.shape[1]))
        root, stopped = text.choose(out.logits[-1])
        text.put((root,))
        streams = self._streams_after(out, input_ids.shape[1] - 1, 0, cache)
        self.stats.prefill_s = (begun := time.perf_counter()) - started

        while not stopped:
            # 2. draft: a tree of likely continuations under the certain token
            tree = self.drafter.tree(streams, root, self.tree_nodes, memory)
            # 3. verify: the base's own logits after every node, and the next streams, in one pass
            ids = torch.tensor([tree.tokens])
            positions = torch.tensor([tree.depths]) + cache.length
            out = self._pass(ids, positions, tree, cache)
            # 4. accept: follow the base's choices as far as they were drafted
            accepted = walk(tree, lambda node, logits=out.logits: text.choose(logits[node]))  # type: ignore[misc]
            text.put(accepted.tokens)
            # 5. keep the accepted rows; the last choice is the next root
            cache.keep(accepted.path)
            root, stopped = accepted.tokens[-1], accepted.stopped
            self._count(len(tree) - 1, len(accepted.tokens))
            # 6. speculate: the streams of the last accepted node
            if not stopped:
                streams = self._streams_after(out, accepted.path[-1], accepted.path[-1], cache)

        self.stats.tokens = text.emitted
        self.stats.decode_s = time.perf_counter() - begun
        return text.finish(cache)

    def _pass(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        tree: DraftTree | None,
        cache: RowCache,
        prefill: bool = False,
    ) -> PassOutput:
        """One target pass; with the parallel schedule its rows speculate too (at prefill only the last)."""
        device, rows = self.base.device, ids.shape[1]
        nodes = None
        if self.schedule == "parallel":
            nodes = torch.arange(rows - 1 if prefill else 0, rows, device=device)
        mask = None if tree is None or len(tree) == 1 else tree.mask().to(device)
        return self.runner.verify(ids.to(device), positions.to(device), mask, cache, nodes, last_only=prefill)

    def _streams_after(self, out: PassOutput, row: int, speculating: int, cache: RowCache) -> torch.Tensor:
        """`[num_streams, dim]` of one row, which by now is the last certain one in the cache.

        `speculating` is its number among the rows that speculated in the pass.
        """
        if out.streams is not None:
            return out.streams[speculating]
        last = cache.length - 1
        entry = out.entry[None, row : row + 1]
        context = torch.ones(1, 1, cache.length, dtype=torch.bool, device=entry.device)
        position = torch.tensor([[last]], device=entry.device)
        return self.runner.speculate(entry, position, context, cache)[0, 0]

    def _count(self, drafted: int, emitted: int) -> None:
        self.stats.target_passes += 1
        self.stats.drafted += drafted
        self.stats.accepted[emitted] = self.stats.accepted.get(emitted, 0) + 1


# arguments of generate() that are not fields of a generation config
_CALL_ARGUMENTS = frozenset(
    ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
     "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate",
     "tokenizer", "assistant_tokenizer", "input_ids")
)  # fmt: skip


class _Text:
    """The text so far, and the base's choice after it: HF's own sampling step, one row at a time."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        processor: Any,
        criteria: Any,
        config: GenerationConfig,
        streamer: Any,
        memory: TextMemory | None,
    ) -> None:
        self.input_ids, self.processor, self.criteria, self.config = input_ids, processor, criteria, config
        self.streamer, self.memory = streamer, memory
        self.emitted = 0
        keep = config.return_dict_in_generate
        self.scores: tuple[torch.Tensor, ...] | None = () if keep and config.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep and config.output_logits else None

    def choose(self, logits: torch.Tensor) -> tuple[int, bool]:
        """The base's choice given `[vocab]` logits, and whether it ends the text.

        Greedy is argmax; sampled is one `torch.multinomial` over the processed distribution, the very
        draw that `model.generate` makes at this position, from the same global generator.
        """
        raw = logits[None].to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.processor(self.input_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self.config.do_sample:
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        self.input_ids = torch.cat([self.input_ids, token], dim=-1)
        self.emitted += 1
        stopped = bool(self.criteria(self.input_ids, self.scores)[0])
        return int(token), stopped

    def put(self, tokens: tuple[int, ...]) -> None:
        """Hand tokens to the text's memory, and to the streamer, one call each, as the base does."""
        if self.memory is not None:
            self.memory.extend(tokens)
        if self.streamer is not None:
            for token in tokens:
                self.streamer.put(torch.tensor([token]))

    def finish(self, cache: RowCache) -> Any:
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.input_ids
        found: dict[str, Any] = {"sequences": self.input_ids, "scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(**found, past_key_values=cache)


def accelerate(
    model: PreTrainedModel, adapter: str | Path | StreamingConfig | StreamAdapter, tokenizer: Any = None, **overrides: Any
) -> AcceleratedModel:
    """Attach an adapter to a frozen model.

    Args:
        model: any HF decoder-only causal LM, 8-bit and 4-bit ones included.
        adapter: a folder or hub id; or a `StreamingConfig` for a fresh, untrained one; or the adapter itself.
        tokenizer: if given, it is part of the comparison with the base that the adapter was trained for.
        overrides: `tree_nodes`, `schedule` or `recall` (see `StreamingConfig`), in place of the adapter's own.

    Raises:
        UsageError: the adapter cannot be read, or its shapes are another model's.
    """
    if isinstance(adapter, StreamingConfig):
        adapter = new_adapter(model, adapter, tokenizer)
    elif not isinstance(adapter, StreamAdapter):
        adapter = StreamAdapter.from_pretrained(adapter, base={"fingerprint": fingerprint(model, tokenizer)})
    fast = AcceleratedModel(model, adapter)
    if unknown := sorted(overrides.keys() - OVERRIDES):
        raise UsageError(f"accelerate() takes {', '.join(sorted(OVERRIDES))} as overrides, got {', '.join(unknown)}")
    replace(adapter.config, **overrides)  # checks them
    for name, value in overrides.items():
        setattr(fast, name, value)
    return fast


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
