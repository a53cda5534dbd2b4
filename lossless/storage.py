"""Files that survive an interruption, and the versions that every result names.

Knows: JSON, JSONL, atomic writes. Does not know: what is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UsageError


def write_json(path: str | Path, content: Any) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".part")
    staging.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staging, path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in a torn one; no file is no lines."""
    path = Path(path)
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


@contextlib.contextmanager
def append_jsonl(path: str | Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append lines, each flushed as it is written; a torn last line is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as lines:

        def write(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()

        yield write


@contextlib.contextmanager
def resumed(path: Path | None, whose: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """A journal of a long job: the records that it holds, and what appends one. No path: nothing is kept.

    Args:
        whose: what the job was asked to do, the journal's first line.

    Raises:
        UsageError: the journal is of another job.
    """
    kept, whose = read_jsonl(path) if path else [], json.loads(json.dumps(whose))
    if kept and kept[0] != whose:
        other = ", ".join(key for key in whose if kept[0].get(key) != whose[key])
        raise UsageError(f"{path} was begun with other settings ({other}): use them again, or remove it")
    with append_jsonl(path or os.devnull) as write:
        if not kept:
            write(whose)
        yield kept[1:], write


def ensure_room(folder: str | Path, needed: int) -> None:
    """Raises UsageError if the disk of `folder` has not so many bytes left: better before a file than in its middle."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"the disk of {folder} is full: {needed / 2**20:.1f} MB are needed and {free / 2**20:.1f} are free; "
            "what was saved before is whole, and with more room the same command goes on"
        )


def versions() -> dict[str, str]:
    """Versions of everything that can move a bit or a microsecond."""
    found = {"python": platform.python_version()}
    for package in ("lossless-streams", "torch", "transformers", "accelerate", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
