"""Multi-stream attention inside the frozen model's own layers.

Knows: where stream rows enter the base, which rows they may attend to, and how one pass carries main
rows and stream rows. Does not know: how a tree is grown, what is accepted, or how weights are trained.

The base itself is never touched: passes run through a copy of its structure over the same tensors (base/structure.py), or
through a twin with packed weights. Hooks of the copy insert the stream rows before layer N - N_s, add the MSA adapters to the
projections of stream rows, and take stream rows out behind the last layer; and attention goes through `attention.py`, which gives
main rows and stream rows a call of their own. Main rows see main keys only, so their results do not depend on the
streams. Streams that run alone have layers of their own, with the adapters merged into their weights.

Row order in the top layers: main rows, then the streams of the first speculating node (1..gamma), of
the second, and so on. Keys: past rows, main rows, stream rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapter.compat import check_fit
from ..adapter.weights import StreamAdapter
from ..base.attention import SDPA
from ..base.fused import unfuse_plain
from ..base.layers import (
    CACHE,
    after_layers,
    column_masks,
    decoder_layers,
    device_of,
    input_device,
    refuse_other_rows,
    rotaries,
    shortest_window,
    uses_attention_interface,
)
from ..base.packed import model_bytes
from ..base.structure import structure_of
from ..errors import UsageError
from .attention import ATTENTION
from .cache import RowCache
from .calls import LayerCalls, note_rotary
from .fusing import fuse
from .hooks import adapt, keep_bits
from .invariance import AloneRows
from .layers import stream_layers
from .masks import PositionMask, behind_the_past, stream_mask
from .passes import PASS, Pass, PassOutput, with_plan
from .short import ShortPass

_BESIDE = 4096  # columns behind the last place that streams of a pass may take; expanded ones take no memory


class StreamRunner:
    """A frozen base and an adapter that fits it.

    Args:
        base: any decoder-only causal LM whose decoder layers stand in one list.
        adapter: its weights.
        model: a copy of the base's structure to run through, a packed twin for example; None makes one over the same tensors.

    Raises:
        UsageError: the model has no such layers, or the adapter's shapes are of another model.
    """

    def __init__(self, base: PreTrainedModel, adapter: StreamAdapter, model: Any = None) -> None:
        self.base: Any = base
        check_fit(base, adapter)
        self.model: Any = structure_of(base) if model is None else model
        self.adapter = adapter
        self.text_config = self.model.config.get_text_config()
        self.layers = decoder_layers(self.model)
        self.top = self.layers[len(self.layers) - adapter.config.num_msa_layers :]
        self.lm_head = self.model.get_output_embeddings()
        self.own_attention = not uses_attention_interface(base)
        self.implementation = self.text_config._attn_implementation  # the base's own attention
        self.rotaries = rotaries(self.model)
        self._after = after_layers(self.model)
        self.limits: dict[nn.Module, int] | None = None  # rows at a time that keep their bits, by module; None: as many as come
        self._calls = LayerCalls(self.model, self.layers, self.own_attention)  # of the top layers; learnt in the first pass
        # rotary positions go on for ever, a table of positions ends
        endless = self.rotaries and not any(hasattr(rotary, "embed_positions") for rotary in self.rotaries)
        self.places = 2**31 if endless else getattr(self.text_config, "max_position_embeddings", None) or 2**31
        self._stream_mask = partial(stream_mask, gamma=adapter.config.num_streams, last=self.places - 1)
        for name, low_rank in adapter.adapters():
            low_rank.to(device_of(self._projection(name)))
        if self.own_attention:  # rows of a tree do not stand in columns of their own place
            mask: Any
            for mask in (module for layer in self.layers for module in column_masks(layer)):
                columns = mask.bias.shape[-1] + _BESIDE
                mask.bias = mask.bias.new_ones(1, 1, 1, 1).expand(1, 1, columns, columns)
        else:
            self.text_config._attn_implementation = ATTENTION
        fused = unfuse_plain(self.layers)  # a packed model's own short way does not know passes
        self._unhooked = structure_of(self.top)
        self._hook()
        self.fused = fused and fuse(self.layers, self.first_top, self.own_hooks)  # whether passes go the short way where they can
        self.fused_streams = False  # the same of streams that run alone
        self.attends_exactly = False  # rows that are read alone attend by base/exact.py

    @property
    def first_top(self) -> int:
        """N - N_s, the number of the lowest layer with streams."""
        return len(self.layers) - len(self.top)

    def _projection(self, name: str) -> Any:
        """The base's module of an MSA adapter, `<layer from N - N_s>.<path>`."""
        index, path = name.split(".", 1)
        return self.top[int(index)].get_submodule(path)

    @cached_property
    def stream_layers(self) -> nn.ModuleList:
        """The layers that streams run through alone."""
        weights = decoder_layers(self.base)[self.first_top :]
        return stream_layers(self._unhooked, self.adapter, weights, model_bytes(self.base))

    @cached_property
    def _stream_paths(self) -> AloneRows:
        """What the streams of one node see of each other."""
        return AloneRows([range(j + 1) for j in range(self.adapter.config.num_streams)])

    @cached_property
    def as_the_base(self) -> bool:
        """Whether a row alone attends as in the base's own call: no layer has a window, and no kernel is chosen by how keys lie in memory."""
        return not self.own_attention and shortest_window(self.base) is None and all(device_of(layer).type == "cpu" for layer in self.layers)

    @cached_property
    def _short(self) -> ShortPass | None:
        """Passes by the parts of a model whose layers are fused."""
        return ShortPass.of(self)

    @property
    def parts(self) -> nn.ModuleList:
        """All that passes run through."""
        return nn.ModuleList([self.model, self.stream_layers])

    def keep_bits(self, limits: dict[nn.Module, int], always: bool = True) -> None:
        """From now on every row of a pass has the bits of a pass of its own: of every pass, or of those that ask for it.

        limits: rows at a time for which a projection keeps them.
        """
        self.limits = limits if always else None
        keep_bits(limits)

    def _hook(self) -> None:
        """What makes the copy's layers carry streams. It stays: nobody else calls them."""
        entered = self.layers if self.own_attention else self.top
        first = len(self.layers) - len(entered)
        for number, layer in enumerate(entered, first):
            layer.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
        for module in self.rotaries:
            module.register_forward_hook(note_rotary, with_kwargs=True)
        self.top[-1].register_forward_hook(self._part)
        self.own_hooks = len(entered) + 1  # of its layers
        self.lm_head.register_forward_pre_hook(self._leave)
        adapt(self.top, self.adapter)

    def verify(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        tree_mask: torch.Tensor | None,
        cache: Any,
        nodes: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None,
        last_only: bool = False,
        apart: bool = False,
    ) -> PassOutput:
        """One pass of the base over some rows, and of the streams of some of them.

        Args:
            ids: `[batch, rows]`, or embeddings `[batch, rows, dim]` in place of tokens.
            positions: `[batch, rows]`, each row's place in its text.
            tree_mask: `[batch, rows, rows]`, True where a row may attend to another row of this pass; every
                row attends to what is certain in the cache. None for a chain (each row sees those before it).
            cache: a `RowCache`; the rows stay provisional in it.
            nodes: `[m]` rows that speculate (on the CPU: they index tensors on several devices), or None for none; or
                what chooses them, given all rows at layer N - N_s, `[batch, rows, dim]`.
            last_only: logits for the last row only (a prefill).
            apart: every row as in a pass of its own, in a runner that can (`keep_bits`); not of padded texts, nor of several.
        """
        count, unpadded = ids.shape[1], len(ids) == 1 and cache.visible() is None
        fits = self.fused and unpadded and nodes is None and not apart and (count == 1 or not last_only)
        if fits and ids.ndim == 2 and self._short is not None:
            return self._short(ids, positions, tree_mask, cache)
        device = input_device(self.base)
        ids, positions = ids.to(device), positions.to(device)
        tree_mask = None if tree_mask is None else tree_mask.to(device)

        def own(some: torch.Tensor) -> torch.Tensor:  # [batch or 1, some rows, rows], what they see of this pass
            return (torch.arange(count) <= some[:, None])[None].to(device) if tree_mask is None else tree_mask[:, some]

        keys = torch.cat([cache.places().to(device).expand(len(ids), -1), positions], dim=1)
        # one row sees everything, and sdpa knows by itself how to be causal: as the base's own calls
        alone = count == 1 or (cache.length == 0 and self._knows_causal())
        plain = tree_mask is None and alone and cache.visible() is None
        allowed = None if plain else behind_the_past(own(torch.arange(count)), cache, len(ids))
        plan = Pass(self.implementation, len(ids), count, PositionMask(allowed, positions, keys), last_only=last_only, exactly=self.attends_exactly)

        def paths() -> AloneRows:
            return AloneRows([[i for i, seen in enumerate(row) if seen] for row in own(torch.arange(count))[0].tolist()])

        single = count == 1 and nodes is None
        like_base = single and self.as_the_base
        plan.keeps_bits = unpadded and not like_base and (apart or self.limits is not None)
        # a row alone sees no more keys than the base's own would, for a mask over those behind a window rounds otherwise
        if unpadded and (apart or (not last_only and (self.limits is not None or (single and not self.own_attention)))):
            plan.alone = None if like_base and not plan.exactly else paths()
        if self.fused and unpadded and (apart or not last_only or count == 1):  # a packed base reads a text of one token so, too
            plan.paths = plan.alone or paths()

        def begin(entry: torch.Tensor) -> None:
            chosen: Any = nodes(entry) if callable(nodes) else nodes
            plan.nodes = chosen
            plan.stream = self._stream_mask(behind_the_past(own(chosen), cache, len(ids)), positions[:, chosen], keys)

        plan.begin = None if nodes is None else begin
        logits = self.run(plan, ids, positions, cache)
        if plan.streams is None or plan.nodes is None:
            return PassOutput(logits, plan.entry)
        streams = plan.streams.unflatten(1, (-1, self.adapter.config.num_streams))
        return PassOutput(logits, plan.entry, streams, tuple(plan.nodes.tolist()))

    def observe(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The main stream over whole texts, without streams: what they are trained on.

        ids: `[batch, T]`, padded on the right. Returns `[batch, T, dim]` at layer N - N_s and
        `[batch, T, dim]` after the final norm; keys and values are left in the (empty) cache.
        """
        plan, _ = self._observe(ids, cache)
        return plan.entry, plan.final

    def _observe(self, ids: torch.Tensor, cache: Any) -> tuple[Pass, torch.Tensor]:
        """The pass, and `[batch, 1, vocab]` logits of the last row."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        allowed = None if self._knows_causal() else torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        plan = Pass(self.implementation, len(ids), ids.shape[1], PositionMask(allowed, positions, positions), last_only=True)
        return plan, self.run(plan, ids, positions, cache)

    def observe_anything(self) -> tuple[Pass, torch.Tensor]:
        """A short pass over some text, to see how the base goes about it."""
        ids = torch.tensor([[1 + 3 * i % (self.text_config.vocab_size - 1) for i in range(8)]], device=input_device(self.model))
        return self._observe(ids, RowCache(len(self.layers)))

    def _knows_causal(self) -> bool:
        """Whether the base's attention is causal by itself over rows that are all of its keys."""
        return self.implementation in SDPA and not self.own_attention

    def run(self, plan: Pass, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """The base's forward under a plan: `[batch, rows asked for, vocab]`."""
        plan.cache = cache
        given = {"input_ids": ids} if ids.ndim == 2 else {"inputs_embeds": ids}
        logits: torch.Tensor = with_plan(plan, lambda: self.model(**given, position_ids=positions, **{CACHE: cache}, use_cache=True).logits)
        if plan.entry.ndim != 3:
            raise UsageError(f"{type(self.base).__name__} cannot be accelerated: a forward that was put in the place of its own goes past copies of its layers")
        return logits

    def speculate(
        self,
        entry: torch.Tensor,
        positions: torch.Tensor,
        context: torch.Tensor,
        cache: Any,
        told: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Streams alone through the top layers, over main keys that are already in the cache.

        Args:
            entry: `[batch, nodes, dim]`, main rows at layer N - N_s; positions: `[batch, nodes]`.
            context: `[batch, nodes, past]`, True where a node's streams may attend to a main key.
            cache: anything whose `update(keys, values, layer)` returns main keys followed by these, and whose
                `places()` says where in the text those keys stand.
            told: `[batch, nodes, dim]`, embeddings of the token after each node, for an adapter that is told it.

        Returns:
            `[batch, nodes, num_streams, dim]` after the final norm. The layers are called as the base calls its own.
        """
        if not self._calls:  # no main rows have passed yet
            with torch.no_grad():
                self.observe_anything()
        plan = Pass(self.implementation, len(entry), 0, cache=cache)
        if self.fused_streams and entry.shape[:2] == (1, 1) and cache.visible() is None and context.all():
            places = (positions + torch.arange(1, self.adapter.config.num_streams + 1)).clamp_max(self.places - 1)
            plan.paths, plan.stream = self._stream_paths, PositionMask(None, places, places)
        else:
            keys = cache.places().to(entry.device).expand(len(entry), -1)
            plan.stream = self._stream_mask(context.to(entry.device), positions.to(entry.device), keys)
        return with_plan(plan, lambda: self._through_streams(plan, entry, told))

    def _through_streams(self, plan: Pass, entry: torch.Tensor, told: torch.Tensor | None) -> torch.Tensor:
        """`[batch, nodes, num_streams, dim]` after the final norm."""
        hidden = self.adapter.start_streams(entry, told)
        for number, layer in enumerate(self.stream_layers, self.first_top):
            if number not in self._calls or plan.done:
                continue  # a layer that the base itself passes over, or that was done by one before it
            hidden = layer(hidden, **self._calls.filled(number, plan, hidden))
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.finish(hidden).unflatten(1, (-1, self.adapter.config.num_streams))

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the last layer to what the LM head reads."""
        for part in self._after:
            hidden = part(hidden)
        return hidden

    def _enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: at the first of the top, the streams join the rows; what it is given covers them."""
        plan = PASS.get()
        if plan is None or plan.main is None:
            return None
        shared = self.own_attention or plan.nodes is not None or plan.begin is not None  # one call for main rows and streams
        hidden = self._calls.hidden(number, args, kwargs)
        if number in self._calls and not shared:
            if layer is self.top[0]:
                plan.entry = hidden
            return None
        given = self._calls.note(number, args, kwargs, plan)
        if layer is self.top[0]:
            refuse_other_rows(self.base, hidden, plan.batch, plan.main_rows)
            hidden = hidden.to(self.adapter.device)  # another than the layer's below, perhaps
            plan.entry = hidden
            if plan.begin is not None:
                plan.begin(hidden)
                hidden = torch.cat([hidden, self.adapter.start_streams(hidden[:, plan.nodes])], dim=1)
        if shared:
            given = self._calls.filled(number, plan, hidden)
        return (hidden,), given

    def _part(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last layer: stream rows step aside, main rows go on."""
        plan = PASS.get()
        if plan is None or plan.nodes is None or plan.main is None:
            return None
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        plan.streams = self.finish(hidden[:, plan.main_rows :])
        hidden = hidden[:, : plan.main_rows].contiguous()
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    def _leave(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the LM head: of a prefill only the last row goes on."""
        plan = PASS.get()
        if plan is None or plan.main is None:
            return None
        plan.final = args[0]
        # dense: over a slice of several texts torch multiplies each with a copy of the weight, if that is frozen
        return (args[0][:, -1:].contiguous(),) if plan.last_only else None
