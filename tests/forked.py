"""Processes that are forked from one which has imported everything: to begin by itself takes a process seconds, most of them torch's and
transformers'.

Knows: how such a process begins, where it says what, how it is killed. Does not know: what it works at. What is read while modules are
imported, such as the address of a hub, is as it was when the first one began.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["lossless.cli.parser", "tests.conftest", "matplotlib.figure", "transformers.models.llama.modeling_llama"])
_PATIENCE_S = 240  # after which a command hangs


def _begin(work: Callable[..., int], given: tuple[object, ...], environment: dict[str, str], said: str, told: str) -> None:
    """In the process itself; what it says goes to files."""
    for path, number in ((said, 1), (told, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(work(*given))


class Forked:
    """Work in a process of its own, which begins at once.

    Args:
        folder: where files with what it says are put.
        work: gives the exit code; a function that a module has, called with what is given.
        changed: in the environment.

    Attributes:
        said, told: files of its standard output and of its errors.
    """

    def __init__(self, folder: Path, work: Callable[..., int], *given: object, changed: Mapping[str, str] | None = None) -> None:
        name = f"process-{time.monotonic_ns()}"
        self.said, self.told = folder / f"{name}-said.txt", folder / f"{name}-told.txt"
        environment = dict(os.environ) | dict(changed or {})
        self.process = _PROCESSES.Process(target=_begin, args=(work, given, environment, str(self.said), str(self.told)))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def output(self) -> str:
        """All that it has said, then its errors."""
        return "".join(path.read_text(errors="replace") for path in (self.said, self.told) if path.exists())

    def signal(self, number: int) -> None:
        os.kill(int(self.process.pid or 0), number)

    def kill(self) -> bool:
        """SIGKILL; whether it was still running."""
        running = self.running
        self.process.kill()
        self.process.join()
        return running

    def kill_after(self, seconds: float) -> bool:
        """The same, when so much time has passed or it has ended."""
        self.process.join(seconds)
        return self.kill()

    def finish(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        self.process.join(_PATIENCE_S)
        if self.kill():
            return -1, f"it hangs for {_PATIENCE_S} s"
        return int(self.process.exitcode or 0), self.output()
