"""What a long run has found so far: counted, kept in a file from which the same command goes on, and shown as it comes.

Knows: JSON, a progress line, exit codes. Does not know: what is tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lossless.base.processes import device_name
from lossless.errors import UsageError
from lossless.storage import versions, write_json

_SHOWN = 20  # failures that are kept in full; the rest are counted


class Tally:
    """The findings of one command.

    Args:
        command: its name; settings: what makes it the same run.
        path: the file; None keeps nothing.

    Attributes:
        done: cases that are behind; counts: of each kind of outcome; failures: what went wrong, with the way to see it again.
    """

    def __init__(self, command: str, settings: dict[str, Any], path: str | Path | None = None) -> None:
        self.path = Path(path) if path else None
        self.command, self.settings = command, settings
        self.done, self.counts, self.failures, self.measured = 0, Counter[str](), list[str](), dict[str, Any]()
        self._before, self._started = 0.0, time.monotonic()
        if self.path and self.path.is_file():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if (kept["command"], kept["settings"]) != (command, json.loads(json.dumps(settings))):
                raise UsageError(f"{self.path} is of another run ({kept['command']} {kept['settings']}): remove it, or name another file")
            self.done, self.counts, self.failures = kept["done"], Counter(kept["counts"]), kept["failures"]
            self.measured, self._before = kept["measured"], kept["seconds"]

    def count(self, outcome: str) -> None:
        self.counts[outcome] += 1

    def fail(self, what: str) -> None:
        """Something is not as promised."""
        self.counts["failed"] += 1
        if len(self.failures) < _SHOWN:
            self.failures.append(what)
        tqdm.write(f"FAILED: {what}", file=sys.stderr)

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "settings": self.settings,
            "done": self.done,
            "counts": dict(sorted(self.counts.items())),
            "measured": self.measured,
            "failures": self.failures,
            "seconds": round(self._before + time.monotonic() - self._started, 1),
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def close(self, path: str | Path | None = None) -> int:
        """Save, say what was found, and give the exit code: 1 if anything failed.

        Args:
            path: where a run goes that cannot be taken up again, and so was given none.
        """
        self.path = Path(path) if path else self.path
        self.save()
        print(f"{self.command}: {self.done} done; {', '.join(f'{count} {kind}' for kind, count in sorted(self.counts.items())) or 'nothing'}")
        for key, value in self.measured.items():
            print(f"  {key}: {value}")
        return 1 if self.counts["failed"] else 0


def resident_mib() -> float:
    """What this process has in memory, after the allocator has handed back what it keeps of each thread's for later: that would
    look like a leak."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_mib(reset: bool = False) -> float:
    """The most that it had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@contextlib.contextmanager
def own_cache() -> Iterator[Path]:
    """What the package keeps on disk goes into a folder of its own, which is gone afterwards."""
    before = os.environ.get("LOSSLESS_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOSSLESS_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["LOSSLESS_CACHE"]
            if before is not None:
                os.environ["LOSSLESS_CACHE"] = before
