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
import enum
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
from .anatomy import decoder, decoder_layers, final_norm, find_projections, uses_attention_interface
from .errors import UsageError

_ATTENTION = "lossless_streams"


@dataclass
class _Sight:
    """Which keys some rows of a pass may attend to, in layers with and without a sliding window.

    Args:
        allowed: `[batch, rows, keys]`, None if the base's attention knows by itself (one row, or plain causal).
        rows: `[batch, rows]`, keys: `[batch, keys]`, each one's place in its text.
    """

    allowed: torch.Tensor | None
    rows: torch.Tensor
    keys: torch.Tensor
    _found: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def within(self, window: int | None) -> torch.Tensor | None:
        """`[batch, 1, rows, keys]`, True where a row may attend: to at most the last `window` places."""
        if window not in self._found:
            seen = self.allowed
            if window is not None and int(self.rows.max() - self.keys.min()) >= window:
                distance = self.rows[:, :, None] - self.keys[:, None]
                near = distance < window
                seen = near & (distance >= 0) if seen is None else near & seen
            self._found[window] = None if seen is None else seen[:, None]
        return self._found[window]


class _Slot(enum.Enum):
    """An argument of a decoder layer that depends on the rows of the pass."""

    CACHE = enum.auto()
    POSITIONS = enum.auto()
    MASK = enum.auto()


@dataclass(frozen=True, eq=False)
class _RotaryCall:
    """How the base made position embeddings: which module, and what else it was given."""

    module: Any
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        return self.module(hidden, positions, *self.rest, **self.kwargs)


@dataclass(frozen=True)
class _Habit:
    """How the base calls one of its top layers: hidden states first, then these; slots are filled anew."""

    args: list[Any]
    kwargs: dict[str, Any]


@dataclass
class _Pass:
    """One trip through the layers: what the hooks and the attention function must know of it."""

    implementation: str  # the base's own attention
    main_rows: int
    main: _Sight | None = None  # None: a pass of streams alone
    stream: _Sight | None = None  # its keys are the main keys and those of the streams
    last_only: bool = False  # logits of the last main row only
    nodes: torch.Tensor | None = None  # [m] main rows that speculate
    cache: Any = None
    rotaries: list[tuple[_RotaryCall, Any]] = field(default_factory=list)  # and what each call gave
    slots: dict[Any, Any] = field(default_factory=dict)  # what fills the top layers' arguments
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
    window = kwargs.get("sliding_window")
    rows, outputs = plan.main_rows, []
    if plan.main is not None:
        keys = key.shape[2] - (query.shape[2] - rows)
        seen = _mask(plan.main.within(window), query, plan.implementation)
        outputs.append(attention(module, query[:, :, :rows], key[:, :, :keys], value[:, :, :keys], seen, **kwargs)[0])
    if plan.stream is not None and query.shape[2] > rows:  # not in the lower layers
        seen = _mask(plan.stream.within(window), query, plan.implementation)
        outputs.append(attention(module, query[:, :, rows:], key, value, seen, **kwargs)[0])
    return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), None


AttentionInterface.register(_ATTENTION, _attend)


def _mask(allowed: torch.Tensor | None, query: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """A boolean mask in the form that the base's attention takes: as it is, or added to the scores."""
    if allowed is None or implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(~allowed, torch.finfo(query.dtype).min)


def _behind_the_past(own: torch.Tensor, cache: Any, batch: int) -> torch.Tensor:
    """`[batch or 1, rows, own rows]` -> `[batch, rows, past + own rows]`: what is certain is seen as well."""
    seen = own.new_ones(batch, own.shape[1], cache.length + own.shape[2])
    seen[:, :, cache.length :] = own
    if (visible := cache.visible()) is not None:
        seen[:, :, : cache.length] = visible[:, None].to(own.device)
    return seen


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
        self._habits: list[_Habit] = []
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
        handles += [module.register_forward_hook(_note_rotary, with_kwargs=True) for module in self._rotaries]
        handles.append(self.lm_head.register_forward_pre_hook(self._leave))
        for name, low_rank in self.adapter.adapters():
            index, path = name.split(".", 1)
            projection = self.top[int(index)].get_submodule(path)
            handles.append(projection.register_forward_hook(_adapting(low_rank)))
        if not self._own_attention:
            self.text_config._attn_implementation = _ATTENTION
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
        allowed = None if plain else _behind_the_past(own, cache, len(ids))
        plan = _Pass(self._implementation, ids.shape[1], _Sight(allowed, positions, keys), last_only=last_only)
        if nodes is not None:
            plan.nodes = nodes
            plan.stream = self._stream_sight(_behind_the_past(own[:, nodes], cache, len(ids)), positions[:, nodes], keys)
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
        plan = _Pass(self._implementation, ids.shape[1], _Sight(allowed, positions, positions), last_only=True)
        self._run(plan, ids, positions, cache)
        return plan.entry, plan.final

    def _run(self, plan: _Pass, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """The base's forward under a plan: `[batch, rows asked for, vocab]`."""
        mask = None
        if self._own_attention and plan.main is not None and (seen := plan.main.within(None)) is not None:
            mask = _mask(seen, self.model.get_input_embeddings().weight[:0], "eager")
        self._habits, plan.cache = [], cache
        with _running(plan):
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
        plan = _Pass(self._implementation, 0, stream=self._stream_sight(context, positions, keys), cache=cache)
        hidden = self.adapter.start_streams(entry)
        with _running(plan):
            for layer, habit in zip(self.top, self._habits, strict=True):
                args, kwargs = self._filled(habit, plan, hidden)
                hidden = layer(hidden, *args, **kwargs)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return final_norm(self.model)(hidden).unflatten(1, (-1, self.adapter.config.num_streams))

    def _stream_sight(self, context: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> _Sight:
        """What streams see: their node's main context, and streams i <= j of their own node.

        context: `[batch, nodes, main keys]`; positions: `[batch, nodes]`; keys: `[batch, main keys]`.
        Stream j of position t stands at t + j.
        """
        gamma, (batch, nodes, _) = self.adapter.config.num_streams, context.shape
        earlier = context.new_ones(gamma, gamma).tril()
        same_node = torch.eye(nodes, dtype=torch.bool, device=context.device)
        among = torch.kron(same_node, earlier).bool().expand(batch, -1, -1)
        places = (positions[:, :, None] + torch.arange(1, gamma + 1, device=positions.device)).flatten(1)
        allowed = torch.cat([context.repeat_interleave(gamma, dim=1), among], dim=2)
        return _Sight(allowed, places, torch.cat([keys.expand(batch, -1), places.expand(batch, -1)], dim=1))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a top layer: at the first, the streams join the rows; at each, what it is given covers them."""
        plan = _PASS.get()
        if plan is None or plan.main is None:
            return None
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if layer is self.top[0]:
            plan.entry = hidden
        habit = _Habit([_named(value, plan) for value in args], {key: _named(v, plan, key) for key, v in kwargs.items()})
        self._habits.append(habit)
        if plan.nodes is not None:
            if layer is self.top[0]:
                hidden = torch.cat([hidden, self.adapter.start_streams(hidden[:, plan.nodes])], dim=1)
            args, kwargs = self._filled(habit, plan, hidden)
        return (hidden, *args), kwargs

    def _filled(self, habit: _Habit, plan: _Pass, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments for the rows of this pass, main rows and streams."""
        if not plan.slots:
            sights = [sight for sight in (plan.main, plan.stream) if sight is not None]
            plan.slots[_Slot.CACHE] = plan.cache
            plan.slots[_Slot.POSITIONS] = torch.cat([sight.rows.expand(len(hidden), -1) for sight in sights], dim=1)
            plan.slots[_Slot.MASK] = None
            if self._own_attention:
                plan.slots[_Slot.MASK] = _mask(_side_by_side(plan), hidden, "eager")
        positions = plan.slots[_Slot.POSITIONS]

        def fill(value: Any) -> Any:
            if isinstance(value, _Slot):
                return plan.slots[value]
            if isinstance(value, _RotaryCall):
                if value not in plan.slots:
                    plan.slots[value] = value(hidden, positions)
                return plan.slots[value]
            return value

        return tuple(map(fill, habit.args)), {key: fill(value) for key, value in habit.kwargs.items()}

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


def _named(value: Any, plan: _Pass, key: str = "") -> Any:
    """A layer's argument, or the slot or call that it came from."""
    if key == "attention_mask":
        return _Slot.MASK
    if key == "position_ids":
        return _Slot.POSITIONS
    if value is plan.cache:
        return _Slot.CACHE
    return next((call for call, output in plan.rotaries if output is value), value)


def _note_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After the base made position embeddings: remember how, so that streams get theirs the same way."""
    plan = _PASS.get()
    if plan is not None and plan.main is not None:
        given = [*args, *(kwargs.pop(name) for name in ("x", "position_ids") if name in kwargs)]
        plan.rotaries.append((_RotaryCall(module, tuple(given[2:]), dict(kwargs)), output))


def _side_by_side(plan: _Pass) -> torch.Tensor | None:
    """One mask `[batch, 1, rows, keys]` for main rows and streams, for a base whose attention is its own."""
    if plan.stream is None or plan.stream.allowed is None:
        return None
    if plan.main is None:
        return plan.stream.within(None)
    streams = plan.stream.allowed
    main = streams.new_zeros(len(streams), plan.main_rows, streams.shape[2])
    keys = streams.shape[2] - streams.shape[1]
    main[:, :, :keys] = _tril(plan.main, keys) if plan.main.allowed is None else plan.main.allowed
    return torch.cat([main, streams], dim=1)[:, None]


def _tril(sight: _Sight, keys: int) -> torch.Tensor:
    return sight.rows[:, :, None] >= sight.keys[:, None, :keys]


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
