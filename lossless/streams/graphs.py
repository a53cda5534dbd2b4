"""Passes as CUDA graphs (kernels/graphs.py): the hundreds of small kernels of a pass are launched at once.

Knows: which passes can be run so, and how one that was captured is told of another. Every other pass goes the runner's usual way. Does
not know: trees, or what is accepted.

    PiecewiseRunner    of a base as it is loaded: attention, whose kernels hang on the length of a text, is called as ever, by the base's own
                       function, between the pieces; captured for each number of rows
    GraphedRunner      of a model that was packed for a GPU (base/packed.py): all of a pass, and streams, for its attention is a kernel of
                       ours; captured for 16 and 32 rows, for on a GPU the time of a pass is that of reading the weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

from ..base.attention import SDPA
from ..base.gpu_layers import GpuLayer, gpu_layers
from ..base.layers import rotary_turns
from ..base.norms import is_norm
from ..base.structure import global_hooks, listeners
from ..errors import CALLED_OTHERWISE
from ..kernels import gpu
from ..kernels.gpu import Told
from ..kernels.graphs import Outputs, Pieces, Recorded
from .attention import attend
from .cache import RowCache
from .masks import PositionMask
from .passes import PASS, Pass, PassOutput, with_plan
from .runner import StreamRunner
from .short import paths_of

_ROWS = (16, 32)  # of the passes of a packed model; fewer are filled up


class _CapturingRunner(StreamRunner):
    """A runner that captures passes, and streams that run alone: these may be wrong, and attend by a kernel of ours.

    Attributes:
        recordable: whether passes can be captured. Not, if somebody's hooks are to be called in each of them, if the base is on several devices, or
            if something in it waits for the GPU, as experts do that are chosen by what they are given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recordable = not self.own_attention and not rotary_turns(self.base) and _is_work_alone(self.base)
        self._recorded: dict[int, Recorded] = {}  # all of a pass, by rows; -1, -2: streams alone, by what they are given
        self._by_kernel = self.implementation in SDPA and gpu.available()  # whether rows may attend by a kernel of ours
        self._few: dict[int, bool] = {}  # whether what is captured, by the same keys, takes the few kernels of base/gpu_layers.py

    def _readable(self, cache: Any) -> bool:
        """Whether a captured pass can look back at what is in a cache."""
        return self.recordable and isinstance(cache, RowCache) and cache.visible() is None and all(layer.is_initialized for layer in cache.rows)

    def _no_cache(self) -> RowCache:
        """A cache that gives a layer its own rows, and keeps none."""
        return RowCache(len(self.layers), keep_from=len(self.layers))

    def speculate(
        self, entry: torch.Tensor, positions: torch.Tensor, context: torch.Tensor, cache: Any, told: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `StreamRunner.speculate`; the cheapest with positions and context on the CPU."""
        whole = entry.shape[:2] == (1, 1) and context.shape[-1] == cache.length and bool(context.all())
        if whole and self._calls and self._by_kernel and self._readable(cache) and self._alike(cache):
            gamma, place = self.adapter.config.num_streams, int(positions)
            paths, places = [[*range(j + 1)] for j in range(gamma)], [min(place + j, self.places - 1) for j in range(1, gamma + 1)]
            numbers = [*Told.listed(cache.length, self._room(cache, gamma), False, paths, gamma), *places]
            inputs = (entry,) if told is None else (entry, told)
            if (found := self._replayed(-len(inputs), numbers, self._streams_alone, *inputs)) is not None:
                return found[0]
        return super().speculate(entry, positions, context, cache, told)

    def _room(self, cache: RowCache, rows: int) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of all layers, with room for so many rows."""
        return cache.room(range(len(self.layers)), rows, cache.rows[0].keys).kept

    def _alike(self, cache: RowCache) -> bool:
        """Whether keys and values of all layers have the strides of the first one's, of which alone a kernel is told."""
        return len({each.stride() for layer in cache.rows for each in (layer.keys, layer.values)}) == 1

    def _replayed(self, key: int, numbers: Sequence[int], run: Callable[..., Outputs], *inputs: torch.Tensor) -> Outputs | None:
        """What a pass gives, in tensors of its own; captured if it was not before; None if it cannot be."""
        given = torch.tensor(numbers)
        if key not in self._recorded:
            try:
                self._few[key] = self._same_in_few_kernels(key, run, given.to(self.adapter.device), *inputs)
                self._recorded[key] = Recorded(run, given.to(self.adapter.device), *inputs)
            except CALLED_OTHERWISE:  # it waits for the GPU, or asks a cache for what it has not
                self._by_kernel = False
                return None
        return tuple(output.clone() for output in self._recorded[key](given, *inputs))

    def _same_in_few_kernels(self, key: int, run: Callable[..., Outputs], *inputs: torch.Tensor) -> bool:
        """Whether what is to be captured has the very same outputs in few kernels."""
        if not _shorten(self.stream_layers if key < 0 else self.layers):
            return False
        self._few[key] = False
        expected = run(*inputs)
        self._few[key] = True
        try:
            return all(map(torch.equal, run(*inputs), expected))
        except CALLED_OTHERWISE:
            return False

    def _streams_alone(self, numbers: torch.Tensor, entry: torch.Tensor, told: torch.Tensor | None = None) -> Outputs:
        """The same of streams: numbers, entry and the next token's embedding, `[1, 1, dim]` -> `[1, 1, num_streams, dim]`."""
        gamma = self.adapter.config.num_streams
        places = numbers[None, -gamma:]
        plan = Pass(self.implementation, 1, 0, stream=PositionMask(None, places, places), cache=self._no_cache(), told=self._told(numbers, gamma))
        plan.few = self._few.get(-1 if told is None else -2, False)
        return (with_plan(plan, lambda: self._through_streams(plan, entry, told)),)

    def _told(self, numbers: torch.Tensor, rows: int) -> Told:
        return Told.over(numbers, len(self.layers), rows)


class PiecewiseRunner(_CapturingRunner):
    """A runner through a base as it is loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pieces: dict[Any, tuple[Pieces, torch.Tensor, Outputs, Any]] = {}  # by rows, and how each keeps its bits

    def run(self, plan: Pass, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """As `StreamRunner.run`, in pieces if that can be."""
        count, bare = ids.shape[1], plan.begin is None and plan.pieces is None
        fits = bare and ids.ndim == 2 and len(ids) == 1 and count <= _ROWS[-1] and (count == 1 or not plan.last_only)
        if not fits or not self._readable(cache):
            return super().run(plan, ids, positions, cache)
        numbers, limits = torch.stack([ids, positions]), self.limits if plan.keeps_bits else None
        shape = (count, plan.keeps_bits, plan.alone is None, id(limits))
        if shape not in self._pieces:
            try:
                self._pieces[shape] = self._capture(plan, numbers, limits)
            except CALLED_OTHERWISE:  # it waits for the GPU, or asks a cache for what it has not
                self.recordable = False
                return super().run(plan, ids, positions, cache)
        pieces, own, (logits, entry), _ = self._pieces[shape]
        own.copy_(numbers)
        plan.cache = cache

        def answer(out: torch.Tensor, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> None:
            keys, values = cache.rows[module.layer_idx].update(key, value)
            out.copy_(attend(module, query, keys, values, None, **kwargs)[0])

        def replay() -> torch.Tensor:
            pieces.replay(answer)
            return logits.clone()

        found = with_plan(plan, replay)
        plan.entry = entry.clone()
        return found

    def _capture(self, like: Pass, numbers: torch.Tensor, limits: Any) -> tuple[Pieces, torch.Tensor, Outputs, Any]:
        """A pass over these ids and positions `[2, 1, rows]`: its pieces, the tensor of the numbers, logits and entry, and the limits that it was
        captured under."""
        with torch.inference_mode(False), torch.no_grad():
            pieces, own = Pieces(), numbers.clone()
            ids, positions = own

            def run(pieces: Pieces) -> Outputs:
                plan = Pass(self.implementation, 1, ids.shape[1], PositionMask(None, positions, positions), pieces=pieces)
                plan.keeps_bits, plan.alone = like.keeps_bits, like.alone
                logits = StreamRunner.run(self, plan, ids, positions, self._no_cache())
                return logits, plan.entry

            return pieces, own, pieces.capture(run), limits


class GraphedRunner(_CapturingRunner):
    """A runner through a model that was packed for a GPU.

    What a pass is told, its rows, their places and paths, and where keys and values lie, stands in a tensor of its own. What the filling
    rows leave in the cache lies behind the rows of the pass, and the next one overwrites it.
    """

    def verify(
        self, ids: torch.Tensor, positions: torch.Tensor, tree_mask: torch.Tensor | None, cache: Any, nodes: Any, last_only: bool = False, apart: bool = False
    ) -> PassOutput:
        """As `StreamRunner.verify`; the cheapest with ids, positions and mask on the CPU."""
        count = ids.shape[1]
        fits = ids.ndim == 2 and len(ids) == 1 and count <= _ROWS[-1] and nodes is None and not apart and (count == 1 or not last_only)
        if fits and self._by_kernel and not self._crowded and self._readable(cache) and self._alike(cache):
            rows = next(rows for rows in _ROWS if count <= rows)
            paths = [[*range(row + 1)] for row in range(count)] if tree_mask is None else paths_of(tree_mask)
            filling = [0] * (rows - count)
            numbers = [*Told.listed(cache.length, self._room(cache, rows), True, paths, rows), *ids[0].tolist(), *filling, *positions[0].tolist(), *filling]
            if (found := self._replayed(rows, numbers, self._pass_over(rows))) is not None:
                return PassOutput(found[0][:, :count], found[1][:, :count])
        return super().verify(ids, positions, tree_mask, cache, nodes, last_only, apart)

    @property
    def _crowded(self) -> bool:
        """Whether some norm must take rows one by one, which a captured pass does not."""
        return self.limits is not None and any(map(is_norm, self.limits))

    def _pass_over(self, rows: int) -> Callable[[torch.Tensor], Outputs]:
        """What is captured of a pass over so many rows: numbers -> logits `[1, rows, vocab]` and entry `[1, rows, dim]`."""

        def run(numbers: torch.Tensor) -> Outputs:
            told, (ids, positions) = self._told(numbers, rows), numbers[-2 * rows :].view(2, 1, rows)
            plan = Pass(self.implementation, 1, rows, PositionMask(None, positions, positions), told=told, few=self._few.get(rows, False))
            logits = self.run(plan, ids, positions, self._no_cache())
            return logits, plan.entry

        return run


def _shorten(layers: nn.ModuleList) -> bool:
    """Let layers, which nobody else may call, go in few kernels where a pass says so; False, and nothing is done, unless all of them look as if they
    could."""
    if all(hasattr(layer.forward, "few") for layer in layers):
        return True
    if (found := gpu_layers(layers)) is None:
        return False
    layer: Any
    for layer, few in zip(layers, found, strict=True):
        layer.forward = _shortened(layer.forward, few)
    return True


def _shortened(forward: Any, few: GpuLayer) -> Any:
    """A layer's forward."""

    def short(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan, turned = PASS.get(), kwargs.get("position_embeddings")
        if args or plan is None or plan.told is None or not plan.few or not isinstance(turned, tuple):
            return forward(hidden_states, *args, **kwargs)
        cos, sin = turned
        if cos.shape != (1, hidden_states.shape[1], few.attention.head_dim) or cos.dtype is not hidden_states.dtype:
            return forward(hidden_states, *args, **kwargs)
        return few(hidden_states, cos, sin, plan.told)

    short.few = few  # type: ignore[attr-defined]
    return short


def _is_work_alone(base: Any) -> bool:
    """Whether a pass through a base is work on the current GPU and nothing else: what Python does in it is not done again."""
    there = {tensor.device for tensor in (*base.parameters(), *base.buffers())}
    here = there == {torch.device("cuda", torch.cuda.current_device())} if torch.cuda.is_available() else len(there) == 1
    heard = any(map(_is_heard, base.modules())) or bool(global_hooks())
    return here and not base.training and not heard


def _is_heard(module: Any) -> bool:
    """Whether somebody hooked or patched it; Accelerate's hooks do nothing where nothing is kept elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    return listeners(module) > (type(hook) is AlignDevicesHook and not hook.offload)
