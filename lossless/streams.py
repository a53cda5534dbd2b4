"""Multi-stream attention inside the frozen model's own layers.

Knows: where stream rows enter the base, which rows they may attend to, and how one pass carries main
rows and stream rows. Does not know: how a tree is grown, what is accepted, or how weights are trained.

Nothing of the base is replaced. While `StreamRunner.installed()` holds, hooks insert the stream rows
before layer N - N_s, add the MSA adapters to the projections of stream rows, and keep stream rows from
the LM head; and attention goes through `passes.py`, which gives main rows and stream rows a call of their
own. Main rows see main keys only, so their results do not depend on the streams. When the context
ends, so does every trace of it.

Row order in the top layers: main rows, then the streams of the first speculating node (1..gamma), of
the second, and so on. Keys: past rows, main rows, stream rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .adapter import StreamAdapter
from .anatomy import decoder, decoder_layers, final_norm, find_projections, uses_attention_interface
from .errors import UsageError
from .passes import ATTENTION, PASS, Habit, Pass, RotaryCall, Slot, adapting, named, note_rotary, running
from .sight import Sight, as_mask, behind_the_past, side_by_side, stream_sight

_MERGED_BYTES = 64 * 2**20  # most that a copy of the top layers' projections may take


@dataclass(frozen=True)
class PassOutput:
    """What a pass yields.

    Attributes:
        logits: `[batch, rows, vocab]` of the main rows that were asked for.
        entry: `[batch, rows, dim]`, the main rows at layer N - N_s, where streams start.
        streams: `[batch, nodes, num_streams, dim]` after the final norm, for the nodes that speculated.
    """

    logits: torch.Tensor
    entry: torch.Tensor
    streams: torch.Tensor | None = field(default=None)


class StreamRunner:
    """A frozen base and an adapter that fits it.

    Args:
        model: any decoder-only causal LM whose decoder layers stand in one list.
        adapter: its weights; None only to ask for `projections`.

    Raises:
        UsageError: the model has no such layers, or the adapter's shapes are of another model.
    """

    def __init__(self, model: PreTrainedModel, adapter: StreamAdapter) -> None:
        self.model: Any = model
        self.adapter = adapter
        self.text_config = model.config.get_text_config()
        self.layers = decoder_layers(model)
        self.top = self.layers[len(self.layers) - adapter.config.num_msa_layers :]
        self._rotaries = [m for m in decoder(model).children() if "Rotary" in type(m).__name__]
        self._own_attention = not uses_attention_interface(model)
        self._habits: list[Habit] = []
        self.lm_head = model.get_output_embeddings()
        self._check_fit()
        self._merged = self._merge()

    def _check_fit(self) -> None:
        dim, expected = self.text_config.hidden_size, find_projections(self.model, self.adapter.config.num_msa_layers)
        if self.adapter.stream_embeddings.shape[1] != dim:
            raise UsageError(
                f"the adapter is for hidden states of width {self.adapter.stream_embeddings.shape[1]}, "
                f"the model's are {dim} wide: it belongs to another model"
            )
        found = self.adapter.projections()
        if found != expected:
            odd = sorted(found.items() ^ expected.items())[0]
            raise UsageError(f"the adapter's projections are not the model's (first: {odd}): it belongs to another model")
        ids = self.adapter.draft_ids
        if ids is not None and int(ids.max()) >= self.text_config.vocab_size:
            raise UsageError(
                f"the adapter drafts token {int(ids.max())}, the model's vocabulary ends at "
                f"{self.text_config.vocab_size - 1}: it belongs to another model"
            )

    def _merge(self) -> list[dict[str, torch.Tensor]]:
        """W + B A of every adapted projection, for streams that run alone; empty if that is not to be had.

        In a small model the many small products of the adapters take as long as the layers themselves, and a
        copy of the top layers' weights is little. The base's own weights stay as they are.
        """
        if any(parameter.requires_grad for parameter in self.adapter.parameters()):
            return []
        projections = {name: self._projection(name) for name, _ in self.adapter.adapters()}
        if any(type(projection) is not nn.Linear for projection in projections.values()):  # quantized, for example
            return []
        if sum(p.weight.numel() * p.weight.element_size() for p in projections.values()) > _MERGED_BYTES:
            return []
        merged: list[dict[str, torch.Tensor]] = [{} for _ in self.top]
        for name, low_rank in self.adapter.adapters():
            weight = projections[name].weight.detach()
            update = low_rank.up.float() @ low_rank.down.float()
            index, path = name.split(".", 1)
            merged[int(index)][f"{path}.weight"] = (weight.float() + update).to(weight.dtype)
        return merged

    def _projection(self, name: str) -> Any:
        """The base's module of an MSA adapter, `<layer from N - N_s>.<path>`."""
        index, path = name.split(".", 1)
        return self.top[int(index)].get_submodule(path)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in place and attention rerouted, for the time of the context."""
        implementation = self.text_config._attn_implementation
        self._implementation = implementation
        handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.top]
        handles += [module.register_forward_hook(note_rotary, with_kwargs=True) for module in self._rotaries]
        handles.append(self.lm_head.register_forward_pre_hook(self._leave))
        for name, low_rank in self.adapter.adapters():
            handles.append(self._projection(name).register_forward_hook(adapting(low_rank)))
        if not self._own_attention:
            self.text_config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self.text_config._attn_implementation = implementation
            self._habits = []
            for handle in handles:
                handle.remove()

    def verify(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        tree_mask: torch.Tensor | None,
        cache: Any,
        nodes: torch.Tensor | None,
        last_only: bool = False,
    ) -> PassOutput:
        """One pass of the base over some rows, and of the streams of some of them.

        Args:
            ids: `[batch, rows]`; positions: `[batch, rows]`, each row's place in its text.
            tree_mask: `[batch, rows, rows]`, True where a row may attend to another row of this pass; every
                row attends to what is certain in the cache. None for a chain (each row sees those before it).
            cache: a `RowCache`; the rows stay provisional in it.
            nodes: `[m]` rows that speculate, or None for none.
            last_only: logits for the last row only (a prefill).
        """
        device = ids.device
        own = tree_mask
        if own is None:
            own = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
        keys = torch.cat([cache.places().to(device).expand(len(ids), -1), positions], dim=1)
        # one row sees everything, and sdpa knows by itself how to be causal: as the base's own calls
        alone = ids.shape[1] == 1 or (cache.length == 0 and self._implementation == "sdpa")
        plain = tree_mask is None and alone and cache.visible() is None
        allowed = None if plain else behind_the_past(own, cache, len(ids))
        plan = Pass(self._implementation, ids.shape[1], Sight(allowed, positions, keys), last_only=last_only)
        if nodes is not None:
            plan.nodes = nodes
            context = behind_the_past(own[:, nodes], cache, len(ids))
            plan.stream = stream_sight(context, positions[:, nodes], keys, self.adapter.config.num_streams)
        logits = self._run(plan, ids, positions, cache)
        streams = None if plan.streams is None else plan.streams.unflatten(1, (-1, self.adapter.config.num_streams))
        return PassOutput(logits, plan.entry, streams)

    def observe(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The main stream over whole texts, without streams: what they are trained on.

        ids: `[batch, T]`, padded on the right. Returns `[batch, T, dim]` at layer N - N_s and
        `[batch, T, dim]` after the final norm; keys and values are left in the (empty) cache.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        allowed = None
        if self._implementation != "sdpa":
            allowed = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        plan = Pass(self._implementation, ids.shape[1], Sight(allowed, positions, positions), last_only=True)
        self._run(plan, ids, positions, cache)
        return plan.entry, plan.final

    def _run(self, plan: Pass, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """The base's forward under a plan: `[batch, rows asked for, vocab]`."""
        mask = None
        if self._own_attention and plan.main is not None and (seen := plan.main.within(None)) is not None:
            mask = as_mask(seen, self.model.get_input_embeddings().weight[:0], "eager")
        self._habits, plan.cache = [], cache
        with running(plan):
            return self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits

    def speculate(
        self, entry: torch.Tensor, positions: torch.Tensor, context: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Streams alone through the top layers, over main keys that are already in the cache.

        Args:
            entry: `[batch, nodes, dim]`, main rows at layer N - N_s; positions: `[batch, nodes]`.
            context: `[batch, nodes, past]`, True where a node's streams may attend to a main key.
            cache: anything whose `update(keys, values, layer)` returns main keys followed by these, and whose
                `places()` says where in the text those keys stand.

        Returns:
            `[batch, nodes, num_streams, dim]` after the final norm. The layers are called as the base called
            them last, so that a pass of main rows must have come before.
        """
        keys = cache.places().to(entry.device).expand(len(entry), -1)
        plan = Pass(self._implementation, 0, stream=stream_sight(context, positions, keys, self.adapter.config.num_streams), cache=cache)
        hidden = self.adapter.start_streams(entry)
        plan.merged = bool(self._merged)
        with running(plan):
            for number, (layer, habit) in enumerate(zip(self.top, self._habits, strict=True)):
                args, kwargs = self._filled(habit, plan, hidden)
                if plan.merged:
                    hidden = functional_call(layer, self._merged[number], (hidden, *args), kwargs)
                else:
                    hidden = layer(hidden, *args, **kwargs)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return final_norm(self.model)(hidden).unflatten(1, (-1, self.adapter.config.num_streams))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a top layer: at the first, the streams join the rows; at each, what it is given covers them."""
        plan = PASS.get()
        if plan is None or plan.main is None:
            return None
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if layer is self.top[0]:
            plan.entry = hidden
        habit = Habit([named(value, plan) for value in args], {key: named(v, plan, key) for key, v in kwargs.items()})
        self._habits.append(habit)
        if plan.nodes is not None:
            if layer is self.top[0]:
                hidden = torch.cat([hidden, self.adapter.start_streams(hidden[:, plan.nodes])], dim=1)
            args, kwargs = self._filled(habit, plan, hidden)
        return (hidden, *args), kwargs

    def _filled(self, habit: Habit, plan: Pass, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments for the rows of this pass, main rows and streams."""
        if not plan.slots:
            sights = [sight for sight in (plan.main, plan.stream) if sight is not None]
            plan.slots[Slot.CACHE] = plan.cache
            plan.slots[Slot.POSITIONS] = torch.cat([sight.rows.expand(len(hidden), -1) for sight in sights], dim=1)
            plan.slots[Slot.MASK] = None
            if self._own_attention:
                plan.slots[Slot.MASK] = as_mask(side_by_side(plan.main, plan.stream, plan.main_rows), hidden, "eager")
        positions = plan.slots[Slot.POSITIONS]

        def fill(value: Any) -> Any:
            if isinstance(value, Slot):
                return plan.slots[value]
            if isinstance(value, RotaryCall):
                if value not in plan.slots:
                    plan.slots[value] = value(hidden, positions)
                return plan.slots[value]
            return value

        return tuple(map(fill, habit.args)), {key: fill(value) for key, value in habit.kwargs.items()}

    def _leave(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the LM head: stream rows step aside, main rows go on."""
        plan = PASS.get()
        if plan is None:
            return None
        hidden = args[0]
        plan.final = hidden[:, : plan.main_rows]
        if plan.nodes is not None:
            plan.streams = hidden[:, plan.main_rows :]
        first = plan.main_rows - 1 if plan.last_only else 0
        return (hidden[:, first : plan.main_rows],)
