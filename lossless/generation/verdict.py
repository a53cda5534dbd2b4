"""The guarantee that a probe found, kept on disk by all that it depends on, and widened by what is seen later.

Knows: what identifies a base whose arithmetic was probed, and where verdicts lie. Does not know: how they are found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..storage import cache_dir, read_json, write_json
from ..streams.runner import StreamRunner
from .conditions import circumstances, file_name
from .exactness import Guarantee, Passes
from .limits import projections

_PASSES = ("attends_exactly", "fused", "prompts")  # of a guarantee, the last ones
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a file that is no verdict ends with


def verdict_path(reader: StreamRunner, runner: StreamRunner, wanted: str | None, passes: Passes, says: torch.Tensor) -> Path:
    """Where the verdict on this base belongs; says: its logits after some text.

    A base is known by the bits of what it says after a short text: every weight and setting has a part in them, and where two runs round
    otherwise, they must not share a verdict; and by which of its modules somebody hooked, for a hook may act on long texts only.
    """
    depends = circumstances(reader, runner) | {
        "says": hashlib.sha256(says.float().cpu().numpy().tobytes()).hexdigest(), "wanted": wanted, "rows": passes.rows, "streams": passes.streams,
    }  # fmt: skip
    return cache_dir() / "guarantees" / file_name(depends)


def kept_guarantee(path: Path, model: Any, twin: Any, find: Callable[[], Guarantee]) -> Guarantee:
    """The verdict that was found before under the same circumstances, or a new one, which is then kept.

    A file that cannot be read, or be written, costs a probe, nothing else.

    Args:
        model: what rows are read through; twin: what trees may be, or None: projections of the one or the other have limits.
        find: probes them.
    """
    with contextlib.suppress(*BROKEN):  # not there yet, or broken
        return read_guarantee(path, model, twin)
    found = find()
    keep(path, twin if found.twin else model, found)
    return found


def read_guarantee(path: Path, model: Any, twin: Any = None) -> Guarantee:
    """A verdict that was kept; raises one of `BROKEN` if it is not there, or is none of this model."""
    found = read_json(path)
    kept = found["guarantee"]
    if found["digest"] != _digest(kept):
        raise ValueError("a verdict that was damaged: it could promise too much")
    limits: Any = kept["limits"]
    if limits is not None:
        limits = {module: limits.pop(name) for name, module in _named(twin if kept["twin"] else model).items()} | limits
    if limits and not all(isinstance(module, torch.nn.Module) and type(rows) is int for module, rows in limits.items()):
        raise ValueError("limits of other projections")
    return Guarantee(str(kept["level"]), limits, dict(kept["operations"]), float(kept["noise"]), bool(kept["twin"]), _rows(kept["again"]), *(bool(kept[name]) for name in _PASSES))


def keep(path: Path, model: Any, found: Guarantee) -> None:
    """Write it, unless the cache cannot be written to. Bounds only grow: another process may have seen more."""
    with contextlib.suppress(*BROKEN):
        found = found.at_least(read_guarantee(path, model).noise)
    limits = None if found.limits is None else {name: found.limits[module] for name, module in _named(model).items()}
    verdict = {
        "level": found.level, "limits": limits, "operations": found.operations, "noise": found.noise, "twin": found.twin, "again": found.again,
    } | {name: getattr(found, name) for name in _PASSES}  # fmt: skip
    with contextlib.suppress(OSError):
        write_json(path, {"guarantee": verdict, "digest": _digest(verdict)})


def _digest(verdict: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(verdict, sort_keys=True).encode()).hexdigest()


def _rows(kept: Any) -> tuple[int, ...]:
    if not isinstance(kept, list) or not all(type(rows) is int and rows > 1 for rows in kept):
        raise ValueError("no numbers of rows")
    return tuple(kept)


def _named(model: Any) -> dict[str, torch.nn.Module]:
    """A model's projections by the names of its modules."""
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: module for module in projections(model)}
