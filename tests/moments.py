"""Moments of a run at which CPython looks for signals: counted, and something done at some of them.

Knows: that it looks at the entry of a Python function and behind a call of C, which is where a profiler is told of them; so what is
raised here is raised where Ctrl-C is, at a place that a number names. Does not know: what runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any


def moments(run: Callable[[], Any], at: Collection[int] = (), act: Callable[[], None] = lambda: None) -> int:
    """How many moments `run` has. `act` is called at some of them; what it raises comes out of `run`, and ends the profiling."""
    count = 0

    def notice(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        if event in ("call", "c_return"):
            count += 1
            if count in at:
                act()

    sys.setprofile(notice)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def interrupted(run: Callable[[], Any], at: int) -> bool:
    """Run, and press Ctrl-C at a moment; False if the run was over by then, or Python had to ignore it (in a destructor)."""

    def press() -> None:
        raise KeyboardInterrupt

    try:
        moments(run, (at,), press)
    except KeyboardInterrupt:
        return True
    return False


def elsewhere(look: Callable[[], Any]) -> Any:
    """What `look` gives in another thread, while this one waits."""
    given: list[Any] = []
    thread = threading.Thread(target=lambda: given.append(look()), daemon=True)
    thread.start()
    thread.join(60)  # this one may hold a lock that the other needs
    assert given, "it failed, or hangs"
    return given[0]
