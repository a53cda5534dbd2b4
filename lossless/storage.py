"""Files that survive an interruption, who works with them, and the versions that every result names.

Knows: JSON, JSONL, atomic writes, locks. Does not know: what is in them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UsageError

try:
    import fcntl
except ImportError:  # no locks of this kind here: nobody is kept apart
    fcntl = None  # type: ignore[assignment]


def write_json(path: str | Path, content: Any) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")  # two may write to the same place
    try:
        staging.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """Raises UsageError if the file does not hold a JSON object."""
    return _object(Path(path).read_bytes(), str(path))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is broken: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UsageError(f"{where} is broken: it must hold a JSON object, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def alone_with(path: str | Path, wait: bool = False) -> Iterator[None]:
    """No other process works with this folder, or file, meanwhile; the lock goes with its process, however that ends.

    A folder is cleared of what a killed process has half written.

    Raises:
        UsageError: another does, and it is not waited for.
    """
    path = Path(path)
    held = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UsageError(f"another process is at work in {path}: wait until it is done, or name another place") from None
        for leftover in path.glob("*.part"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(held)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in a torn one; no file is no lines.

    Raises:
        UsageError: a whole line is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    return [_object(line, f"{path}, line {number},") for number, line in enumerate(whole.split(b"\n")[:-1], start=1)]


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
        UsageError: the journal is of another job, is broken, or another process is at it.
    """
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(path) if path else contextlib.nullcontext():
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
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lossless-streams", "torch", "transformers", "accelerate", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def cache_dir() -> Path:
    """Where converted models are kept: `$LOSSLESS_CACHE`, else `$XDG_CACHE_HOME/lossless`, else `~/.cache/lossless`."""
    if explicit := os.environ.get("LOSSLESS_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lossless"
