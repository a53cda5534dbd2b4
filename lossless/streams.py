"""Multi-stream attention inside the frozen model's own layers.

Knows: where stream rows enter the base, which rows they may attend to, and how one pass carries main
rows and stream rows. Does not know: how a tree is grown, what is accepted, or how weights are trained.

Nothing of the base is replaced. While `StreamRunner.installed()` holds, hooks insert the stream rows
before layer N - N_s, add the MSA adapters to the projections of stream rows, and keep stream rows from
the LM head; and attention goes through `_attend`, which gives main rows and stream rows a call of their
own. Main rows see main keys only, so their results do not depend on the streams. When the context
ends, so does every trace of it.

Row order in the top layers: main rows, then the streams of the first speculating node (1..gamma), of
the second, and so on. Keys: past rows, main rows, stream rows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .adapter import StreamAdapter
from .anatomy import decoder, decoder_layers, find_projections
from .errors import UsageError

_ATTENTION = "lossless_streams"


@dataclass
class _Pass:
    """One trip through the layers: what the hooks and the attention function must know of it."""

    implementation: str  # the base's own attention
    main_rows: int
    last_only: bool = False  # logits of the last main row only
    nodes: torch.Tensor | None = None  # [m] main rows that speculate
    stream_positions: torch.Tensor | None = None  # [batch, m * gamma]
    stream_mask: torch.Tensor | None = None  # [batch, 1, m * gamma, keys], True: may attend
    rotary: Any = None  # position embeddings of main and stream rows
    entry: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch, main rows, dim] at layer N - N_s
    streams: torch.Tensor | None = None  # [batch, m * gamma, dim] after the final norm
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch, main rows, dim] after it


_PASS: ContextVar[_Pass | None] = ContextVar("lossless_pass", default=None)


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


def _base_attention(module: nn.Module, implementation: str) -> Any:
    """The attention function that the base itself would call."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Main rows over main keys and stream rows over all keys, each in a call of its own.

    query: `[batch, heads, rows, head_dim]`; key, value: `[batch, kv_heads, keys, head_dim]`;
    returns `[batch, rows, heads, head_dim]`.
    """
    plan = _PASS.get()
    if plan is None:
        raise RuntimeError("lossless attention was called outside a pass")
    attention = _base_attention(module, plan.implementation)
    rows, streams = plan.main_rows, query.shape[2] - plan.main_rows
    if streams == 0:
        return attention(module, query, key, value, _mask(attention_mask, query, plan), **kwargs)[0], None
    outputs = []
    if rows:
        keys = key.shape[2] - streams
        own = (query[:, :, :rows], key[:, :, :keys], value[:, :, :keys])
        outputs.append(attention(module, *own, _mask(attention_mask, query, plan), **kwargs)[0])
    stream_mask = _mask(plan.stream_mask, query, plan)
    outputs.append(attention(module, query[:, :, rows:], key, value, stream_mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(_ATTENTION, _attend)


def _behind_the_past(own: torch.Tensor, cache: Any, batch: int) -> torch.Tensor:
    """`[batch or 1, rows, own rows]` -> `[batch, rows, past + own rows]`: what is certain is seen as well."""
    seen = own.new_ones(batch, own.shape[1], cache.length + own.shape[2])
    seen[:, :, cache.length :] = own
    if (visible := cache.visible()) is not None:
        seen[:, :, : cache.length] = visible[:, None].to(own.device)
    return seen


def _mask(allowed: torch.Tensor | None, query: torch.Tensor, plan: _Pass) -> torch.Tensor | None:
    """A boolean mask in the form that the base's attention takes: as it is, or added to the scores."""
    if allowed is None or plan.implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(~allowed, torch.finfo(query.dtype).min)


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
        self.rotary = getattr(decoder(model), "rotary_emb", None)
        self.lm_head = model.get_output_embeddings()
        self._check_fit()

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

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in place and attention rerouted, for the time of the context."""
        implementation = self.text_config._attn_implementation
        self._implementation = implementation
        handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.top]
        handles.append(self.lm_head.register_forward_pre_hook(self._leave))
        for name, low_rank in self.adapter.adapters():
            index, path = name.split(".", 1)
            projection = self.top[int(index)].get_submodule(path)
            handles.append(projection.register_forward_hook(_adapting(low_rank)))
        self.text_config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            self.text_config._attn_implementation = implementation
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
        rows = ids.shape[1]
        plan = _Pass(self._implementation, main_rows=rows, last_only=last_only)
        if nodes is not None:
            own = tree_mask
            if own is None:
                own = torch.ones(1, rows, rows, dtype=torch.bool, device=ids.device).tril()
            plan.nodes = nodes
            plan.stream_positions = self._stream_positions(positions[:, nodes])
            plan.stream_mask = self._stream_mask(_behind_the_past(own[:, nodes], cache, ids.shape[0]))
        logits = self._run(plan, ids, positions, tree_mask, cache)
        streams = None if plan.streams is None else plan.streams.unflatten(1, (-1, self.adapter.config.num_streams))
        return PassOutput(logits, plan.entry, streams)

    def observe(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The main stream over whole texts, without streams: what they are trained on.

        ids: `[batch, T]`, padded on the right. Returns `[batch, T, dim]` at layer N - N_s and
        `[batch, T, dim]` after the final norm; keys and values are left in the (empty) cache.
        """
        plan = _Pass(self._implementation, main_rows=ids.shape[1], last_only=True)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self._run(plan, ids, positions, None, cache)
        return plan.entry, plan.final

    def _run(
        self, plan: _Pass, ids: torch.Tensor, positions: torch.Tensor, tree_mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """The base's forward under a plan: `[batch, rows asked for, vocab]`."""
        rows, past = ids.shape[1], cache.length
        own = tree_mask
        # one row sees everything, and sdpa knows by itself how to be causal: as the base's own calls
        causal = rows > 1 and not (past == 0 and self._implementation == "sdpa")
        if own is None and (causal or cache.visible() is not None):
            own = torch.ones(1, rows, rows, dtype=torch.bool, device=ids.device).tril()
        attention_mask = None if own is None else _behind_the_past(own, cache, ids.shape[0])[:, None]
        with _running(plan):
            return self.model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits

    def speculate(
        self, entry: torch.Tensor, positions: torch.Tensor, context: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Streams alone through the top layers, over main keys that are already in the cache.

        Args:
            entry: `[batch, nodes, dim]`, main rows at layer N - N_s; positions: `[batch, nodes]`.
            context: `[batch, nodes, past]`, True where a node's streams may attend to a main key.
            cache: anything whose `update(keys, values, layer)` returns main keys followed by these.

        Returns:
            `[batch, nodes, num_streams, dim]` after the final norm.
        """
        plan = _Pass(self._implementation, main_rows=0, stream_mask=self._stream_mask(context))
        plan.stream_positions = self._stream_positions(positions)
        hidden = self.adapter.start_streams(entry)
        plan.rotary = self._rotary(hidden, plan.stream_positions)
        with _running(plan):
            for layer in self.top:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_ids=plan.stream_positions,
                    position_embeddings=plan.rotary,
                    past_key_values=cache,
                    use_cache=True,
                )
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return decoder(self.model).norm(hidden).unflatten(1, (-1, self.adapter.config.num_streams))

    def _stream_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Stream j of position t stands at t + j: `[batch, nodes]` -> `[batch, nodes * num_streams]`."""
        steps = torch.arange(1, self.adapter.config.num_streams + 1, device=positions.device)
        return (positions[:, :, None] + steps).flatten(1)

    def _stream_mask(self, context: torch.Tensor) -> torch.Tensor:
        """A stream sees its node's main context, and streams i <= j of its own node.

        `[batch, nodes, main keys]` -> `[batch, 1, nodes * num_streams, main keys + nodes * num_streams]`.
        """
        gamma, (batch, nodes, _) = self.adapter.config.num_streams, context.shape
        earlier = context.new_ones(gamma, gamma).tril()
        same_node = torch.eye(nodes, dtype=torch.bool, device=context.device)
        among = torch.kron(same_node, earlier).bool().expand(batch, -1, -1)
        return torch.cat([context.repeat_interleave(gamma, dim=1), among], dim=2)[:, None]

    def _rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        return None if self.rotary is None else self.rotary(hidden, positions)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a top layer: at the first, the streams join the rows; at each, positions cover them."""
        plan = _PASS.get()
        if plan is None or plan.main_rows == 0:
            return None
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if layer is self.top[0]:
            plan.entry = hidden
            if plan.nodes is not None:
                hidden = torch.cat([hidden, self.adapter.start_streams(hidden[:, plan.nodes])], dim=1)
        if plan.nodes is not None:
            if plan.rotary is None:
                positions = torch.cat([kwargs["position_ids"], plan.stream_positions], dim=1)  # type: ignore[list-item]
                plan.rotary = (self._rotary(hidden, positions), positions)
            kwargs["position_embeddings"], kwargs["position_ids"] = plan.rotary
        return (hidden, *args[1:]), kwargs

    def _leave(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the LM head: stream rows step aside, main rows go on."""
        plan = _PASS.get()
        if plan is None:
            return None
        hidden = args[0]
        plan.final = hidden[:, : plan.main_rows]
        if plan.nodes is not None:
            plan.streams = hidden[:, plan.main_rows :]
        first = plan.main_rows - 1 if plan.last_only else 0
        return (hidden[:, first : plan.main_rows],)


@contextlib.contextmanager
def _running(plan: _Pass) -> Iterator[None]:
    token = _PASS.set(plan)
    try:
        yield
    finally:
        _PASS.reset(token)


def _adapting(low_rank: nn.Module) -> Any:
    """A forward hook that adds an MSA adapter to the stream rows of a projection's output."""

    def add(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        plan = _PASS.get()
        if plan is None or args[0].shape[1] == plan.main_rows:
            return None
        rows = args[0][:, plan.main_rows :]
        if plan.main_rows == 0:
            return output + low_rank(rows)
        output[:, plan.main_rows :] += low_rank(rows)
        return output

    return add
