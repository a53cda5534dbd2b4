"""The model that a user holds: `accelerate`, and the `generate()` wrapper around the decode loop.

Knows: which calls are served, and that one runs at a time. HF's own `generate` prepares everything, and calls the loop in place of
its own (`custom_generate`). Does not know: what the loop does.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..adapter.compat import new_adapter
from ..adapter.config import AdapterConfig, DraftConfig
from ..adapter.weights import StreamAdapter
from ..base.fingerprint import fingerprint
from ..base.layers import cache_among
from ..base.loading import require_model
from ..base.processes import give_back_memory
from ..base.structure import state_of
from ..drafting.costs import CostCurve
from ..drafting.drafter import Drafter
from ..drafting.noise import generator_of
from ..drafting.policy import FIRST_PAUSE
from ..errors import UsageError, nearest
from ..streams.runner import StreamRunner
from .attach import attach
from .conditions import conditions, without_autocast
from .exactness import Guarantee, Passes
from .fallback import fallback_reason, fallback_reason_as_prepared, lock_of, with_stop_strings
from .loop import DecodeLoop, NearlyTied
from .measure import kept_curve
from .sequence import remembering
from .stats import Stats

OVERRIDES = frozenset(("tree_nodes", "adaptive", "schedule", "recall", "pruning_floor"))  # of an adapter's `DraftConfig`


# methods of a model that give the model itself
_GIVING_THEMSELVES = frozenset(("to", "cpu", "cuda", "float", "half", "bfloat16", "eval", "train", "requires_grad_"))


class AcceleratedModel:
    """A frozen model with an adapter attached; made by `accelerate`.

    `generate` takes what `model.generate` takes and returns the same tokens. Everything else is the
    base's own: attributes that this class does not have are looked up there. The base itself is
    untouched outside a call of `generate`; one call runs at a time.
    """

    def __init__(self, model: PreTrainedModel, adapter: StreamAdapter, exact: str | None = None, drafting: DraftConfig | None = None) -> None:
        self.base: Any = model
        self.adapter = adapter
        self.exact = exact
        self.drafting = drafting or adapter.config.drafting
        self.stats = Stats()
        self._base_lock = lock_of(model)
        self._warned: set[str] = set()
        self._stale, self._measured_again = False, False  # what steps cost
        with self._base_lock.lock:
            self._attach()

    def _attach(self) -> None:
        """Look at the base as it is now."""
        with without_autocast(self.base):
            self.attached = attach(self.base, self.adapter, self.exact, self._passes())
            self.measure_costs(refresh=False)
        self._looked_at = state_of(self.base), conditions(self.base)
        give_back_memory()

    def _passes(self) -> Passes:
        """The passes over trees that this session may make."""
        return Passes(self.drafting.tree_nodes, self.drafting.schedule == "parallel")

    def _holds(self) -> bool:
        """Whether the base is as it was looked at: the same weights, modules and switches, computing under the same conditions."""
        return (state_of(self.base), conditions(self.base)) == self._looked_at and self.attached.passes.covers(self._passes())

    def measure_costs(self, refresh: bool = True) -> CostCurve:
        """What the parts of a step cost here: measured, or, without `refresh`, as it was measured before; seconds the first time."""
        self._pause = FIRST_PAUSE  # between drafts, as the last call left it
        with self._base_lock.lock:  # beside a call everything takes longer
            most = self.attached.most_nodes(self.adapter.config.drafting)
            self.costs = kept_curve(self.reader, self.runner, self.drafter, most, refresh)
        return self.costs

    @property
    def reader(self) -> StreamRunner:
        """Passes with the base's own weights and kernels."""
        return self.attached.reader

    @property
    def runner(self) -> StreamRunner:
        """Passes over trees."""
        return self.attached.runner

    @property
    def drafter(self) -> Drafter:
        """Trees from streams."""
        return self.attached.drafter

    @property
    def guarantee(self) -> Guarantee:
        """What holds here."""
        return self.attached.guarantee

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not yet set: a broken copy must not recurse
            raise AttributeError(name)
        found = getattr(self.base, name)
        if name not in _GIVING_THEMSELVES:
            return found

        def call(*args: Any, **kwargs: Any) -> AcceleratedModel:
            found(*args, **kwargs)
            return self  # not the base, whose answers would not be accelerated

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OVERRIDES:
            raise UsageError(f"{name} is set with the rest of how trees are drafted: fast.drafting = replace(fast.drafting, {name}={value!r})")
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def detach(self) -> PreTrainedModel:
        """The base, as it was."""
        return self.base

    def generate(self, inputs: torch.Tensor | None = None, *given: Any, **kwargs: Any) -> Any:
        """As `model.generate`: same arguments, same result, same random numbers drawn.

        What is not served (beams, assistants, caches of a fixed size, attentions or hidden states as output; in
        batches also a passed-in cache, streamers, scores, and processors or criteria of your own, whose sequences might
        depend on each other; under near-tie processors of your own, which might not bear to be asked twice) goes to the base's own
        `generate`, with one warning for each reason.
        """
        if given:
            named = inspect.signature(GenerationMixin.generate).bind_partial(self.base, inputs, *given, **kwargs).arguments
            kwargs = named.pop("kwargs", {}) | {name: value for name, value in named.items() if name not in ("self", "inputs")}
        with self._base_lock.lock:
            if self._base_lock.serving:  # by a processor, criterion or streamer of the call that is being served
                self._warn("generate was called within generate")
                return self.base.generate(inputs, **kwargs)
            self.stats = Stats()
            if not self._holds():
                self._attach()
            elif self._stale and not self._measured_again:  # once: some machines change their speed all the time
                self._stale, self._measured_again = False, True
                self.measure_costs()
            if reason := fallback_reason(self.base, inputs, kwargs):
                self._hand_over(reason)
                return self.base.generate(inputs, **kwargs)
            try:  # no context manager: Ctrl-C at the entry of its exit would leave the lock taken
                self._base_lock.serving = True
                return self._serve(inputs, with_stop_strings(self.base, kwargs))
            finally:
                self._base_lock.serving = False

    def _serve(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        passed_in = cache_among(kwargs) is not None
        streamer = kwargs.get("streamer")  # HF drops it on its way to a custom loop, so it is bound here
        loop = DecodeLoop(self.attached, self.drafting, self.costs, self.stats, self._pause)
        ahead, exact = self.adapter.config.num_streams, self.guarantee.level

        def decode(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
            if reason := fallback_reason_as_prepared(model, input_ids, streamer, ahead, exact, passed_in, **prepared):
                self._hand_over(reason)
                return model._sample(input_ids, streamer=streamer, **prepared)
            generator = generator_of(input_ids.device)
            before = generator.get_state()
            if len(input_ids) > 1:
                prepared["logits_processor"] = remembering(prepared["logits_processor"])
            try:
                found = loop.run(input_ids, streamer=streamer, passed_in=passed_in, **prepared)
            except NearlyTied:
                generator.set_state(before)
                self.stats = Stats()
                self._hand_over("two tokens of a text in a batch were nearly tied")
                return model._sample(input_ids, streamer=streamer, **prepared)
            self._stale, self._pause = loop.stale, loop.pause
            return found

        return self.base.generate(inputs, custom_generate=decode, **kwargs)

    def _hand_over(self, reason: str) -> None:
        """Note that the base answers, and warn of it the first time."""
        self.stats.served, self.stats.why = False, reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"not accelerated: {reason}; the base's own generate answers", stacklevel=4)


def accelerate(
    model: PreTrainedModel, adapter: str | Path | AdapterConfig | StreamAdapter, tokenizer: Any = None,
    exact: str | None = None, **overrides: Any,
) -> AcceleratedModel:  # fmt: skip
    """Attach an adapter to a frozen model.

    Args:
        model: any HF decoder-only causal LM, 8-bit and 4-bit ones included.
        adapter: a folder or hub id; or a `AdapterConfig` for a fresh, untrained one; or the adapter itself.
        tokenizer: if given, it is part of the comparison with the base that the adapter was trained for.
        exact: `bitwise`, every number that decides a token has the bits of the base's own pass of one row;
            `near-tie`, passes of several rows may be rounded otherwise, but a choice that this could change is made
            again from rows read one by one; `off`, it is not. None: bitwise where the device gives it, near-tie where
            that would cost much and spare nothing (`fast.guarantee` says which). Texts of a batch of several are `off`, but for choices
            that are nearly tied in float32: these have the base's own generate answer.
        overrides: `tree_nodes`, `adaptive`, `schedule`, `recall` or `pruning_floor` (see `DraftConfig`), in place of the adapter's own.

    Raises:
        UsageError: the adapter cannot be read, its shapes are another model's, the model cannot be served, or the
            device does not give the exactness that was asked for.
    """
    if unknown := sorted(overrides.keys() - OVERRIDES):
        raise UsageError(f"accelerate() takes {', '.join(sorted(OVERRIDES))} as overrides, got {', '.join(unknown)}{nearest(unknown[0], OVERRIDES)}")
    require_model(model)
    if not isinstance(adapter, str | Path | AdapterConfig | StreamAdapter):
        raise UsageError(f"adapter must be a folder, a hub id, a AdapterConfig or a StreamAdapter, got {type(adapter).__name__}")
    if isinstance(adapter, AdapterConfig):
        adapter = new_adapter(model, adapter, tokenizer)
    elif not isinstance(adapter, StreamAdapter):
        adapter = StreamAdapter.from_pretrained(adapter, base={"fingerprint": fingerprint(model, tokenizer)}).half()  # as it is saved: copies work
    return AcceleratedModel(model, adapter, exact, adapter.config.changed(**overrides).drafting)
