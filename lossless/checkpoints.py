"""Checkpoints of a training: whole or not there.

Knows: Accelerate's own checkpoints, how far a training has come, and which settings may change on the way. Does not
know: what is trained.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .errors import UsageError
from .storage import ensure_room, read_jsonl, write_json

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
        folder = self.out / f"checkpoint-{progress.step:06d}"
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
            written = json.loads((found[-1] / "progress.json").read_text(encoding="utf-8"))
            if other := differing(written["settings"], self.settings):
                raise UsageError(
                    f"{self.out} holds a checkpoint of another training ({', '.join(other)}): use the same again to go on, or another folder"
                )
            self.accelerator.load_state(str(found[-1]))
            progress = Progress(**written["progress"])
        if self.accelerator.is_main_process:
            curve = [entry for entry in read_jsonl(self.out / "curve.jsonl") if found and entry["step"] <= progress.step]
            staging = self.out / "curve.jsonl.part"
            staging.write_text("".join(json.dumps(entry) + "\n" for entry in curve), encoding="utf-8")
            os.replace(staging, self.out / "curve.jsonl")
        self.accelerator.wait_for_everyone()
        return progress

    def latest_told(self) -> str:
        """Where the last good one is, in words."""
        found = self._whole()
        return f"the last good checkpoint is {found[-1]}" if found else "before any checkpoint"

    def _whole(self) -> list[Path]:
        return sorted(path.parent for path in self.out.glob("checkpoint-*/progress.json"))


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
