"""The cost curve of a base on this machine: measured once, kept on disk by all that it depends on.

Knows: how to time passes, streams and levels of a tree, and where the times are kept. Does not know: trees' worth, or texts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..base.layers import as_decoding, context_limit, input_device
from ..drafting.costs import CostCurve
from ..drafting.drafter import Drafter
from ..drafting.tree import DraftTree
from ..storage import cache_dir, read_json, write_json
from ..streams.cache import RowCache
from ..streams.passes import PassOutput
from ..streams.runner import StreamRunner
from .conditions import circumstances, file_name

BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError)  # what reading a file that is no curve ends with
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of the passes that are measured
_CONTEXT, _FAR = 128, 640  # tokens behind which they are, and those that tell what a longer text adds
_REPEATS = 5
_SECONDS = 8.0  # a large model is measured less often, and at fewer points


@torch.no_grad()
def measure(reader: StreamRunner, runner: StreamRunner, drafter: Drafter, max_nodes: int) -> CostCurve:
    """Time every part of a step, each the least of some runs, in a few seconds: what disturbs a run only adds to it.

    Args:
        reader: passes as the base makes them; runner: passes over trees; max_nodes: the most rows of one.
    """
    gamma = runner.adapter.config.num_streams
    known = context_limit(runner.base) or _CONTEXT  # a table of positions may be short
    longest = max(1, min(runner.places, known) - max(_ROWS) - gamma)
    near = _Text(reader, runner, min(_CONTEXT, longest))
    with as_decoding(reader.model), as_decoding(runner.model):
        plain = _time(lambda: near.read(reader, 1), _REPEATS)
        affordable = max(1.0, _SECONDS / plain / 3)  # passes, each taken for as much as three plain ones
        repeats = int(min(_REPEATS, max(1, affordable // len(_ROWS))))
        rows = [n for n in _ROWS if n <= max(2, max_nodes)]
        rows = rows if affordable >= len(rows) else rows[:: -(-len(rows) // int(affordable))]
        passes = _rising([_time(lambda n=n: near.read(runner, n), repeats) for n in rows])  # type: ignore[misc]
    pass_key, row_key = 0.0, 0.0
    if repeats > 1 and longest >= _FAR and 8 in rows:
        far = _Text(reader, runner, _FAR)
        with as_decoding(runner.model):
            added = [(_time(lambda n=n: far.read(runner, n), repeats) - passes[rows.index(n)]) / (_FAR - _CONTEXT) for n in (1, 8)]  # type: ignore[misc]
        row_key = max(0.0, (added[1] - added[0]) / 7)
        pass_key = max(0.0, added[0] - row_key)
    speculate = near.speculation(drafter)
    streams = speculate()
    level = _time(lambda: drafter.trees(streams, [1], 32, [None]), repeats) / gamma
    return CostCurve(plain, tuple(rows), tuple(passes), _time(speculate, repeats), level, near.length, pass_key, row_key)


class _Text:
    """A text that has been read, and passes behind it."""

    def __init__(self, reader: StreamRunner, runner: StreamRunner, length: int) -> None:
        self.runner, self.length, self.device = runner, length, input_device(runner.base)
        self.ids = [1 + 7 * i % (runner.text_config.vocab_size - 1) for i in range(max(length, max(_ROWS)))]
        self.cache = RowCache(len(runner.layers), length + max(_ROWS))
        places = torch.arange(length, device=self.device)[None]
        reader.verify(torch.tensor([self.ids[:length]], device=self.device), places, None, self.cache, None, last_only=True)
        self.cache.keep(range(length))

    def read(self, by: StreamRunner, rows: int) -> PassOutput:
        """A tree of so many rows, two children each; nothing of it is kept."""
        vocab = self.runner.text_config.vocab_size
        tree = DraftTree(tuple(i % vocab for i in range(rows)), (-1, *((i - 1) // 2 for i in range(1, rows))))
        mask = tree.mask()[None].to(self.device) if rows > 1 else None
        depths = (torch.tensor([tree.depths], device=self.device) + self.length).clamp_max(self.runner.places - 1)
        out = by.verify(torch.tensor([tree.tokens], device=self.device), depths, mask, self.cache, None)
        out.logits[0, -1].float().argmax().item()  # as the loop chooses; waits for a device that works on its own
        return out

    def speculation(self, drafter: Drafter) -> Callable[[], torch.Tensor]:
        """What runs the streams behind the text: `[1, num_streams, dim]`."""
        entry = self.read(self.runner, 1).entry
        positions = torch.tensor([[self.length - 1]], device=entry.device)
        seen = torch.ones(1, 1, self.length, dtype=torch.bool, device=entry.device)
        told = drafter.embed(torch.tensor([[1]], device=entry.device)) if self.runner.adapter.told is not None else None

        def speculate() -> torch.Tensor:
            streams = self.runner.speculate(entry, positions, seen, self.cache, told)[:, 0]
            streams.sum().item()
            return streams

        return speculate


def _time(run: Callable[[], Any], repeats: int) -> float:
    """The least of some runs, after one that is not counted."""
    run()
    seen = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seen.append(time.perf_counter() - started)
    return min(seen)


def _rising(seconds: list[float]) -> list[float]:
    """More rows never take less: where they seem to, the fewer were disturbed."""
    return [min(seconds[i:]) for i in range(len(seconds))]


def read_curve(path: Path) -> CostCurve:
    """A curve that was kept; raises one of `BROKEN` if it is not there, or is none."""
    return CostCurve.from_dict(read_json(path)["curve"])


def kept_curve(
    reader: StreamRunner, runner: StreamRunner, drafter: Drafter, max_nodes: int, refresh: bool = False
) -> CostCurve:
    """The curve that was measured before under the same circumstances, or a new one, which is then kept.

    A file that cannot be read, or be written, costs a measurement, nothing else.
    """
    depends = circumstances(reader, runner) | {"bitwise": runner.limits is not None, "max_nodes": max_nodes}
    path = cache_dir() / "costs" / file_name(depends)
    if not refresh:
        with contextlib.suppress(*BROKEN):  # not there yet, or broken: it is measured
            return read_curve(path)
    curve = measure(reader, runner, drafter, max_nodes)
    with contextlib.suppress(OSError):  # a cache that cannot be written to
        write_json(path, {"curve": curve.to_dict(), "depends_on": depends})
    return curve
