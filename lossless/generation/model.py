"""The decode loop, and the `generate()` wrapper around it.

Knows: the order of things: draft, verify, accept, keep. HF's own `generate` prepares the config, the
logits processors, the stopping criteria and the inputs, and calls the loop in place of its own
(`custom_generate`). Does not know: how trees are grown or streams computed.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..adapter.compat import new_adapter
from ..adapter.weights import StreamAdapter
from ..base.layers import as_decoding, input_device
from ..base.loading import fingerprint, give_back_memory, require_model
from ..base.structure import state_of
from ..config import StreamingConfig
from ..drafting.costs import CostCurve
from ..drafting.ngram import TextMemory
from ..drafting.noise import FORESEEABLE, Dice, NoiseTape
from ..drafting.policy import DraftPolicy
from ..drafting.tree import DraftTree
from ..errors import UsageError, nearest
from ..streams.cache import RowCache
from ..streams.passes import PassOutput
from .attach import attach
from .conditions import conditions, without_autocast
from .exactness import Passes, moved
from .fallback import exactness, not_served, not_served_as_prepared, turn_of, with_stop_strings
from .measure import kept_curve
from .sequence import Text, result
from .stats import Stats
from .verdict import keep
from .verification import walk

OVERRIDES = frozenset(("tree_nodes", "adaptive", "schedule", "recall", "pruning_floor"))  # fields of an adapter's config that a session may change


class AcceleratedModel:
    """A frozen model with an adapter attached; made by `accelerate`.

    `generate` takes what `model.generate` takes and returns the same tokens. Everything else is the
    base's own: attributes that this class does not have are looked up there. The base itself is
    untouched outside a call of `generate`; one call runs at a time.
    """

    def __init__(self, model: PreTrainedModel, adapter: StreamAdapter, exact: str | None = None, **overrides: Any) -> None:
        self.base: Any = model
        self.adapter = adapter
        self.exact = exact
        self.tree_nodes = adapter.config.tree_nodes
        self.schedule = adapter.config.schedule
        self.recall = adapter.config.recall
        self.adaptive = adapter.config.adaptive
        self.pruning_floor = adapter.config.pruning_floor
        vars(self).update(overrides)  # of `OVERRIDES`
        self.stats = Stats()
        self._turn = turn_of(model)
        self._warned: set[str] = set()
        with self._turn.lock:
            self._attach()

    def _attach(self) -> None:
        """Look at the base as it is now."""
        with without_autocast(self.base):
            self._attached = found = attach(self.base, self.adapter, self.exact, self._passes())
            self.reader, self.runner, self.drafter, self.guarantee = found.reader, found.runner, found.drafter, found.guarantee
            self.measure_costs(refresh=False)
        self._looked_at = state_of(self.base), conditions(self.base)
        give_back_memory()

    def _passes(self) -> Passes:
        """The passes over trees that this session may make."""
        return Passes(self.tree_nodes, self.schedule == "parallel")

    def _holds(self) -> bool:
        """Whether the base is as it was looked at: the same weights, modules and switches, computing under the same conditions."""
        return (state_of(self.base), conditions(self.base)) == self._looked_at and self._attached.passes.covers(self._passes())

    def measure_costs(self, refresh: bool = True) -> CostCurve:
        """What the parts of a step cost here: measured, or, without `refresh`, as it was measured before; seconds the first time."""
        with self._turn.lock:  # beside a call everything takes longer
            self.costs = kept_curve(self.reader, self.runner, self.drafter, self.adapter.config.tree_nodes, refresh)
        return self.costs

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

        What is not served (beams, assistants, caches of a fixed size, attentions or hidden states as output; in
        batches also a passed-in cache, streamers, scores, and processors or criteria of your own, whose sequences might
        depend on each other; under near-tie processors of your own, which might not bear to be asked twice) goes to the base's own
        `generate`, with one warning for each reason.
        """
        with self._turn.lock:
            if self._turn.taken:  # by a processor, criterion or streamer of the call that is being served
                self._warn("generate was called within generate")
                return self.base.generate(inputs, **kwargs)
            self.stats = Stats()
            if not self._holds():
                self._attach()
            if reason := not_served(self.base, inputs, kwargs):
                self._hand_over(reason)
                return self.base.generate(inputs, **kwargs)
            try:  # no context manager: Ctrl-C at the entry of its exit would leave the turn taken
                self._turn.taken = True
                return self._serve(inputs, with_stop_strings(self.base, kwargs))
            finally:
                self._turn.taken = False

    def _serve(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        passed_in = kwargs.get("past_key_values") is not None
        streamer = kwargs.get("streamer")  # HF drops it on its way to a custom loop, so it is bound here
        ahead, exact = self.adapter.config.num_streams, self.guarantee.level

        def decode(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
            if reason := not_served_as_prepared(model, input_ids, streamer, ahead, exact, **prepared):
                self._hand_over(reason)
                return model._sample(input_ids, streamer=streamer, **prepared)
            return self._decode(input_ids, streamer=streamer, passed_in=passed_in, **prepared)

        return self.base.generate(inputs, custom_generate=decode, **kwargs)

    def _hand_over(self, reason: str) -> None:
        """Note that the base answers, and warn of it the first time."""
        self.stats.served, self.stats.why = False, reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"not accelerated: {reason}; the base's own generate answers", stacklevel=4)

    def _decode(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        passed_in: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The loop that stands in for `GenerationMixin._sample`; `input_ids` is `[batch, prompt]`."""
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        # with a passed-in cache the ids may be the new ones only; the mask is always of the whole text
        width = getattr(generation_config, "_mask_length", 0) if attention_mask is None else attention_mask.shape[1]
        width, padding = max(width, prompt.shape[1]), None
        if attention_mask is not None and not attention_mask.all():  # some versions of HF hand over a mask of ones
            padding = attention_mask == 0
        self.stats.exact = exactness(self.guarantee.level, len(input_ids), padding is not None)
        texts = self._texts(input_ids, width, padding, generation_config, logits_processor, stopping_criteria, streamer)
        cache = RowCache(len(self.runner.layers), width + 256, padding)
        if past_key_values is not None and past_key_values.get_seq_length():
            cache.adopt(past_key_values)

        # 1. prefill: each prompt's last row gives the first token and speculates
        started = time.perf_counter()
        out = self._read_prompts(prompt[:, cache.length - width :], padding, cache)
        cache.keep(range(width - cache.length))
        for text, logits in zip(texts, out.logits[:, -1], strict=True):
            text.remember(text.choose_alone(logits))
            self.stats.emit(text.number, (text.last,), (0,), 0)
        policy = DraftPolicy(self.costs if self.adaptive else None)
        active, streams = self._go_on(texts, out, [out.entry.shape[1] - 1] * len(texts), cache, policy)
        self.stats.prefill_s = (begun := time.perf_counter()) - started

        with self._as_decoding():
            while active:
                # 2. draft: under each certain token, a tree of likely continuations
                with self.stats.timing("draft_s"):
                    dice = self._foresee(active, out.logits) if policy.drafting else None
                    policy.read(cache.length)
                    trees = self._draft(streams, active, dice, policy.curve)
                # 3. verify: the base's own logits after every node, and the next streams, in one pass
                with self.stats.timing("pass_s"):
                    out = self._read_trees(trees, active, cache, dice, policy.drafting)
                # 4. accept: follow the base's choices as far as they were drafted
                choices = [text.choose_after(rows, self.runner is self.reader) for text, rows in zip(active, out.logits, strict=True)]
                walks = [walk(tree, choose) for tree, choose in zip(trees, choices, strict=True)]
                for text, tree, accepted in zip(active, trees, walks, strict=True):
                    text.remember(accepted.tokens)
                    self.stats.count(text.number, tree, accepted)
                emitted = sum(len(accepted.tokens) for accepted in walks) / len(walks)
                policy.note(*self._cost(trees), emitted, self.stats.draft_s + self.stats.pass_s)
                # 5. keep the accepted rows; the last choice is the next root
                cache.keep_each([accepted.path for accepted in walks])
                rows = [accepted.path[-1] for accepted in walks]
                if walks[0].open:  # too close to call: made again from rows read one by one, as the base reads them
                    out, rows = self._read_alone(active[0], cache, out.logits[0, rows]), [0]
                # 6. speculate: the streams of each last accepted node, if drafts pay; finished texts leave the batch
                with self.stats.timing("draft_s"):
                    active, streams = self._go_on(active, out, rows, cache, policy)

        self.stats.texts = len(texts)
        self.stats.tokens = sum(text.emitted for text in texts)
        self.stats.decode_s = time.perf_counter() - begun
        if passed_in or generation_config.return_dict_in_generate:
            cache.pass_on(past_key_values)
        return result(texts, past_key_values)

    @contextlib.contextmanager
    def _as_decoding(self) -> Iterator[None]:
        """What HF's own loop enters behind the prefill, for every model that passes run through."""
        with contextlib.ExitStack() as entered:
            for model in {id(by.model): by.model for by in (self.reader, self.runner)}.values():
                entered.enter_context(as_decoding(model))
            yield

    def _draft(self, streams: torch.Tensor | None, texts: list[Text], dice: Dice | None, curve: CostCurve | None) -> list[DraftTree]:
        """A tree under the certain token of each text."""
        roots, memories = [text.last for text in texts], [text.memory for text in texts]
        depths = [self._room(text) for text in texts]
        return self.drafter.trees(streams, roots, self.tree_nodes, memories, dice, depths, curve)

    def _room(self, text: Text) -> int:
        """How deep a tree under this text may be: neither tokens nor places go on for ever."""
        return max(0, min(text.room, self.runner.places - text.position) - 1)

    def _cost(self, trees: list[DraftTree]) -> tuple[int, int]:
        """Rows and drafted levels of a step over these trees, of the largest of them."""
        depth = max(max(tree.depths) for tree in trees)
        return max(map(len, trees)), min(depth + 1, self.adapter.config.num_streams)

    def _streams_join(self, alone: bool) -> bool:
        """Whether streams run in the base's own pass: under near-tie not if its rows are to have the shapes of the base's own."""
        return self.schedule == "parallel" and not (alone and self.stats.exact == "near-tie")

    def _texts(
        self, input_ids: torch.Tensor, width: int, padding: torch.Tensor | None, config: GenerationConfig,
        processor: Any, criteria: Any, streamer: Any,
    ) -> list[Text]:  # fmt: skip
        """The sequences of the batch before anything is generated; `width` columns hold each prompt."""
        noise = NoiseTape(len(input_ids)) if config.do_sample else None
        guard = self.guarantee.noise if self.stats.exact == "near-tie" else 0.0
        texts = []
        for number, ids in enumerate(input_ids):
            hidden, before = 0 if padding is None else int(padding[number].sum()), width - len(ids)
            memory = TextMemory(ids[max(0, hidden - before) :].tolist()) if self.recall else None
            prepared = (processor, criteria, config, noise, memory, streamer, guard)
            texts.append(Text(number, ids[None], hidden, before, *prepared))
        return texts

    def _read_prompts(self, prompt: torch.Tensor, padding: torch.Tensor | None, cache: RowCache) -> PassOutput:
        """The pass over what the cache has not of the prompts, `[batch, rows]` ids or `[batch, rows, dim]` embeddings.

        Prompts are padded on the left; their last rows speculate.
        """
        rows, device = prompt.shape[1], input_device(self.base)
        positions, mask = torch.arange(cache.length, cache.length + rows)[None].expand(len(prompt), -1), None
        if padding is not None:
            positions = (positions - padding.sum(1, keepdim=True).to(positions.device)).clamp_min(0)
            own = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
            # a padding row sees itself, so that its softmax has something to sum
            mask = own & ~padding[:, None, cache.length :].to(device) | torch.eye(rows, dtype=torch.bool, device=device)
        nodes = torch.tensor([rows - 1]) if self._streams_join(alone=True) else None
        return self.reader.verify(prompt.to(device), positions.to(device), mask, cache, nodes, last_only=True)

    def _foresee(self, texts: list[Text], logits: torch.Tensor) -> Dice | None:
        """How the dice will fall for the tokens of a tree under each text, if they are thrown at all."""
        noise, config, device = texts[0].noise, texts[0].config, texts[0].ids.device
        if noise is None or self.tree_nodes == 1 or config.top_k == 1 or device.type not in FORESEEABLE:
            return None
        like = torch.empty(1, logits.shape[-1], dtype=torch.float32, device=device)
        foreseen = noise.foresee([text.number for text in texts], self.adapter.config.num_streams, like)
        # drafts do not know for sure which tokens are the base's best few
        return Dice(foreseen, config.temperature or 1.0, max(config.top_k, self.adapter.config.tree_top_k) if config.top_k else 0)

    def _read_trees(self, trees: list[DraftTree], texts: list[Text], cache: RowCache, dice: Dice | None, drafting: bool) -> PassOutput:
        """One target pass over a tree for each text; with the parallel schedule every node speculates, while drafts pay."""
        width, device = max(map(len, trees)), input_device(self.base)
        ids, positions = torch.zeros(len(trees), width, dtype=torch.long), torch.zeros(len(trees), width, dtype=torch.long)
        mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)  # what fills a smaller tree sees itself
        for i, (tree, text) in enumerate(zip(trees, texts, strict=True)):
            ids[i, : len(tree)] = torch.tensor(tree.tokens)
            positions[i, : len(tree)] = torch.tensor(tree.depths) + text.position
            mask[i, : len(tree), : len(tree)] = tree.mask()
        nodes = self._speculators(trees, width, dice) if drafting and self._streams_join(alone=width == 1) else None
        chosen = None if width == 1 else mask.to(device)
        out = self.runner.verify(ids.to(device), positions.to(device), chosen, cache, nodes)
        self.stats.speculated += len(trees) * len(out.nodes)
        return out

    def _speculators(
        self, trees: list[DraftTree], width: int, dice: Dice | None
    ) -> torch.Tensor | Callable[[torch.Tensor], torch.Tensor]:
        """The rows of a pass over trees that speculate: all, or those that the pruning layer finds worth it."""
        if self.adapter.pruning is None:
            return torch.arange(width)

        def choose(entry: torch.Tensor) -> torch.Tensor:
            exits = self.runner.finish(self.runner.adapter.exit_early(entry))
            return self.drafter.worth_streams(exits, trees, self.pruning_floor, dice)

        return choose

    def _read_alone(self, text: Text, cache: RowCache, doubted: torch.Tensor) -> PassOutput:
        """Read one row a pass, in the base's own shapes, whatever of the text was not read so; choose after the last, whose logits in
        a pass of another shape were `doubted`, `[1, vocab]`."""
        cache.forget(text.before + text.sound)
        device = input_device(self.base)
        for place in range(text.sound, text.ids.shape[1]):
            position = torch.tensor([[place - text.start]], device=device)
            out = self.reader.verify(text.ids[:, place : place + 1].to(device), position, None, cache, None)
            cache.keep([0])
        reread, text.sound = text.ids.shape[1] - text.sound, text.ids.shape[1]
        found = self.guarantee.after(moved(doubted, out.logits[0, -1:].float()))
        if found is not self.guarantee:  # what the probe promised was too little: no longer
            self.guarantee = found
            self.stats.exceeded += 1
            text.widen(found.noise)
            keep(self._attached.kept, self.reader.model, found)
        text.remember(text.choose_alone(out.logits[0, -1]))
        self.stats.count_alone(text.number, text.last, reread)
        return out

    def _go_on(
        self, texts: list[Text], out: PassOutput, rows: list[int], cache: RowCache, policy: DraftPolicy
    ) -> tuple[list[Text], torch.Tensor | None]:
        """The texts that are not finished, and `[texts, num_streams, dim]`: the streams of their row of the pass, None while drafts
        do not pay.

        `rows` are by now the last certain ones in the cache; finished texts are dropped from it.
        """
        going = [i for i, text in enumerate(texts) if not text.stopped]
        active, chosen = [texts[i] for i in going], [rows[i] for i in going]
        if len(going) < len(texts) and going:
            cache.select(going)
        if not going or not policy.drafting or self.tree_nodes == 1:
            return active, None
        if out.streams is not None and set(chosen) <= set(out.nodes):  # not if one was pruned
            return active, out.streams[going, [out.nodes.index(row) for row in chosen]]
        if out.streams is not None:
            self.stats.pruned_wrongly += sum(row not in out.nodes for row in chosen)
        entry = out.entry[going, chosen][:, None]  # [texts, 1, dim]
        positions = torch.tensor([[text.position - 1] for text in active], device=entry.device)
        context = cache.visible()
        if context is None:
            context = torch.ones(len(active), cache.length, dtype=torch.bool)
        told = None
        if self.adapter.told is not None:
            told = self.drafter.embed(torch.tensor([[text.last] for text in active], device=entry.device))
        return active, self.runner.speculate(entry, positions, context[:, None].to(entry.device), cache, told)[:, 0]


def accelerate(
    model: PreTrainedModel, adapter: str | Path | StreamingConfig | StreamAdapter, tokenizer: Any = None,
    exact: str | None = None, **overrides: Any,
) -> AcceleratedModel:  # fmt: skip
    """Attach an adapter to a frozen model.

    Args:
        model: any HF decoder-only causal LM, 8-bit and 4-bit ones included.
        adapter: a folder or hub id; or a `StreamingConfig` for a fresh, untrained one; or the adapter itself.
        tokenizer: if given, it is part of the comparison with the base that the adapter was trained for.
        exact: `bitwise`, every number that decides a token has the bits of the base's own pass of one row;
            `near-tie`, passes of several rows may be rounded otherwise, but a choice that this could change is made
            again from rows read one by one; `off`, it is not. None: bitwise where the device gives it, near-tie where
            that would cost much and spare nothing (`fast.guarantee` says which). Texts of a batch of several are always `off`.
        overrides: `tree_nodes`, `adaptive`, `schedule`, `recall` or `pruning_floor` (see `StreamingConfig`), in place of the adapter's own.

    Raises:
        UsageError: the adapter cannot be read, its shapes are another model's, the model cannot be served, or the
            device does not give the exactness that was asked for.
    """
    if unknown := sorted(overrides.keys() - OVERRIDES):
        raise UsageError(f"accelerate() takes {', '.join(sorted(OVERRIDES))} as overrides, got {', '.join(unknown)}{nearest(unknown[0], OVERRIDES)}")
    require_model(model)
    if not isinstance(adapter, str | Path | StreamingConfig | StreamAdapter):
        raise UsageError(f"adapter must be a folder, a hub id, a StreamingConfig or a StreamAdapter, got {type(adapter).__name__}")
    if isinstance(adapter, StreamingConfig):
        adapter = new_adapter(model, adapter, tokenizer)
    elif not isinstance(adapter, StreamAdapter):
        adapter = StreamAdapter.from_pretrained(adapter, base={"fingerprint": fingerprint(model, tokenizer)})
    replace(adapter.config, **overrides)  # checks them
    return AcceleratedModel(model, adapter, exact, **overrides)
