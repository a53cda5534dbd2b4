"""Checkpoints of a training: whole or not there.

Knows: Accelerate's own checkpoints, how far a training has come, and which settings may change on the way. Does not
know: what is trained.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..errors import UsageError, require_types
from ..storage import ensure_room, read_json, read_jsonl, write_json

# what torch, safetensors and Accelerate say of files that are cut short, damaged, or hold more than numbers (which is never run)
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError)
_PRACTICAL = ("feature_memory_gb", "logits_memory_gb", "checkpoint_every", "tracker")


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    best: float = 0.0
    best_step: int = 0
    worse: int = 0  # evaluations since the best
    stopped: bool = False

    def note(self, acceptance_length: float, patience: int) -> bool:
        """One more evaluation; whether it is the best so far."""
        if acceptance_length > self.best:
            self.best, self.best_step, self.worse = acceptance_length, self.step, 0
            return True
        self.worse += 1
        self.stopped = 0 < patience <= self.worse
        return False


class Checkpoints:
    """Accelerate's checkpoints, of which the newest whole one counts: its `progress.json` is written last."""

    def __init__(self, out: Path, settings: dict[str, Any], accelerator: Accelerator, weights_bytes: int) -> None:
        self.out, self.settings, self.accelerator = out, settings, accelerator
        self._bytes = 4 * weights_bytes  # weights and two moments, and room to spare
        out.mkdir(parents=True, exist_ok=True)

    def save(self, progress: Progress) -> None:
        folder = self.out / _name(progress.step)
        if folder in (before := self._whole()):
            return
        ensure_room(self.out, self._bytes)
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(folder / "progress.json", {"settings": self.settings, "progress": asdict(progress)})
            for old in before:
                shutil.rmtree(old)

    def resume(self) -> Progress:
        """Take up the newest checkpoint, if there is one, and cut from the curve what came after it."""
        found = self._whole()
        if self.accelerator.is_main_process:
            for folder in set(self.out.glob("checkpoint-*")) - set(found):
                shutil.rmtree(folder)
        progress = Progress()
        if found:
            written = self._read(found[-1])
            if other := differing(written["settings"], self.settings):
                raise UsageError(
                    f"{self.out} holds a checkpoint of another training ({', '.join(other)}): use the same again to go on, or another folder"
                )
            progress = Progress(**written["progress"])
            try:
                self.accelerator.load_state(str(found[-1]))
            except torch.OutOfMemoryError:
                raise
            except _UNREADABLE as error:
                raise self._broken(found[-1], error) from error
        if self.accelerator.is_main_process:
            curve = [entry for entry in read_jsonl(self.out / "curve.jsonl") if found and self._step(entry) <= progress.step]
            staging = self.out / "curve.jsonl.part"
            staging.write_text("".join(json.dumps(entry) + "\n" for entry in curve), encoding="utf-8")
            os.replace(staging, self.out / "curve.jsonl")
        self.accelerator.wait_for_everyone()
        return progress

    def _read(self, folder: Path) -> dict[str, Any]:
        """What was written last into a checkpoint."""
        written = read_json(folder / "progress.json")
        try:
            require_types(progress := Progress(**written["progress"]))
            _flat(written["settings"])
            if folder.name != _name(progress.step) or not (0 <= progress.best_step <= progress.step and progress.worse >= 0):
                raise UsageError(f"steps must be counted from 0 to its own, got {written['progress']}")
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise self._broken(folder, error) from error
        return written

    def _step(self, entry: dict[str, Any]) -> int:
        """Of a line of the curve."""
        if type(step := entry.get("step")) is not int:
            raise UsageError(f"{self.out / 'curve.jsonl'} is broken: each line must hold a step, got {str(entry)[:80]}")
        return step

    @staticmethod
    def _broken(folder: Path, error: Exception) -> UsageError:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return UsageError(f"the checkpoint {folder} is broken ({reason}): remove it, and the same command goes on from one before it, or anew")

    def latest_told(self) -> str:
        """Where the last good one is, in words."""
        found = self._whole()
        return f"the last good checkpoint is {found[-1]}" if found else "before any checkpoint"

    def _whole(self) -> list[Path]:
        return sorted(path.parent for path in self.out.glob("checkpoint-*/progress.json"))


def _name(step: int) -> str:
    return f"checkpoint-{step:06d}"


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of settings that are other than before, in any group of them.

    What an earlier version did not note counts as now; what fits into memory, and what is told to whom, may change on the way.
    """
    is_now = _flat(now)
    was = is_now | _flat(before)
    return sorted(key for key in was if key not in _PRACTICAL and (key not in is_now or was[key] != is_now[key]))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found
