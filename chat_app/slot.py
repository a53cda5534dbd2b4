"""One job at a time, first come, first served, all in one thread.

Knows: who waits for whom, who has left, and that jobs run in a thread of their own, so that a caller who goes away holds nobody
up. Does not know: what a job does.

A model is loaded in that thread as well: OpenMP makes a team of threads for each thread that computes, and once a process has more
of them than cores, they sleep between two products in place of spinning. With a second team accelerated answers of the demo model
took 1.4 times as long on two cores.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_ENDING_S = 5.0  # enough for a job that is under way to come to its next step, where it ends

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Job:
    """Someone in the line. It does not hold the work, so that the work may hold it, and both go as soon as they are over.

    Args:
        cancelled: asked by the slot before the work starts, and by the work as often as it likes.

    Attributes:
        done: set once nothing more will happen.
    """

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self.left = False
        self.done = threading.Event()

    def given_up(self) -> bool:
        return self.left or self._cancelled()


class Slot:
    """Runs jobs in the order in which they joined.

    The thread ends with `close`.
    """

    def __init__(self) -> None:
        self._line: list[Job] = []  # the first one is being worked on
        self._work: dict[Job, Callable[[], None]] = {}  # of those that wait
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._serve, name="answers", daemon=True)
        self._worker.start()

    def __len__(self) -> int:
        """Jobs that wait or run."""
        return len(self._line)

    def join(self, job: Job, work: Callable[[], None]) -> None:
        """Go to the end of the line; the work is called once, in the slot's thread, unless the job is given up before.

        In a closed slot a job is done at once, without having run.
        """
        with self._changed:
            if self._closed:
                job.done.set()
            else:
                self._line.append(job)
                self._work[job] = work
                self._changed.notify()

    def call(self, work: Callable[[], _T]) -> _T:
        """What the work gives, in its turn; what it raises is raised here. The slot must not be closed meanwhile."""
        given: Future[_T] = Future()

        def run() -> None:
            try:
                given.set_result(work())
            except BaseException as error:  # it belongs to the caller, who waits
                given.set_exception(error)

        job = Job(lambda: False)
        self.join(job, run)
        job.done.wait()
        return given.result(timeout=0)

    def place(self, job: Job) -> int:
        """Jobs before this one, the running one included; 0 for the running one, and for one that is done."""
        with self._changed:
            return self._line.index(job) if job in self._line else 0

    def leave(self, job: Job) -> None:
        """Give a job up: out of the line at once if it waits, at its next step if it runs."""
        with self._changed:
            job.left = True
            if job in self._line[1:]:
                self._line.remove(job)
                del self._work[job]
                job.done.set()

    def close(self, ending_s: float = _ENDING_S) -> None:
        """Give up every job, and wait, at most so long, for the running one to notice."""
        with self._changed:
            self._closed = True
            for job in self._line:
                job.left = True
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join(ending_s)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if not self._line:
                    return
                job = self._line[0]
                work = self._work.pop(job)
            try:
                if not job.given_up():
                    work()
            except Exception:
                _log.exception("a job failed")  # whoever waits for the next one must not wait for ever
            finally:
                with self._changed:
                    self._line.remove(job)
                job.done.set()
            del job, work  # or what they hold would be held until the next one comes
