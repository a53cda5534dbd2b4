"""Answers on disk: token ids in Arrow shards, appended one by one and readable after any interruption.

Knows: files, what a process may do to them, and that the last of them may be torn. Does not know: models, or what
the answers are for.

A shard is an Arrow IPC stream, one batch an answer while it grows. A full one, or one that an interruption left
without its end, is written anew as a whole: small, and readable by `datasets.load_dataset("arrow", ...)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UsageError
from ..storage import ensure_room

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("turn", pa.int32()),
        ("temperature", pa.float32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
    ]
)
_SHARD_ANSWERS = 4096
_MESSAGE = b"\xff\xff\xff\xff"  # how every message of a stream begins
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a stream that was closed
_ROOM = 64 * 2**20  # bytes that a new shard, and its copy when it is full, may take


class Answers:
    """All answers of a folder, in the order of its shards; ids stay in Arrow's memory until they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @classmethod
    def read(cls, folder: str | Path) -> Answers:
        """Whatever is whole in the shards of `folder`; a folder without any holds no answers."""
        batches = [batch for path in _shards(Path(folder)) for batch in _read_stream(path)[0]]
        return cls(pa.Table.from_batches(batches, SCHEMA))

    @classmethod
    def join(cls, parts: Iterable[Answers]) -> Answers:
        """All of these, one after the other."""
        return cls(pa.concat_tables([part._table for part in parts]))

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> Answers:
        """These answers, each a dict with the fields of `SCHEMA`."""
        return cls(pa.Table.from_pylist(records, SCHEMA))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One answer, a dict with the fields of `SCHEMA`."""
        return {name: self._table[name][number].as_py() for name in SCHEMA.names}

    def column(self, name: str) -> list[Any]:
        """One field of every answer."""
        return list(self._table[name].to_pylist())

    def lengths(self, name: str) -> list[int]:
        """Tokens of `prompt_ids` or `answer_ids`, for every answer."""
        return list(pc.list_value_length(self._table[name]).to_pylist())

    def digest(self) -> str:
        """Tells these answers from others, whatever their order."""
        table, found = self._table.sort_by([("id", "ascending"), ("turn", "ascending")]), hashlib.sha256()
        found.update(json.dumps([table["id"].to_pylist(), table["temperature"].to_pylist()]).encode())
        for name in ("prompt_ids", "answer_ids"):
            found.update(json.dumps(pc.list_value_length(table[name]).to_pylist()).encode())
            found.update(_ids(table[name]).tobytes())
        return found.hexdigest()

    def check_ids(self, vocabulary: int, where: str) -> None:
        """Raises UsageError for a token that a vocabulary of so many does not have."""
        for name in ("prompt_ids", "answer_ids"):
            ids = _ids(self._table[name])
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
                raise UsageError(
                    f"token ids must be at least 0 and below the model's {vocabulary}, {name} in {where} are from {ids.min()} to {ids.max()}: "
                    "the answers are damaged, or another model's"
                )

    def select(self, numbers: Iterable[int]) -> Answers:
        """These answers, in this order."""
        return Answers(self._table.take(pa.array(list(numbers), pa.int64())))

    def emitted(self) -> Any:
        """`[tokens]`, numpy: every answer's ids, one after the other."""
        return _ids(self._table["answer_ids"])


def _ids(column: pa.ChunkedArray) -> Any:
    """`[tokens]`, numpy: the ids of a column of lists, one list after the other."""
    return pa.concat_arrays([chunk.flatten() for chunk in column.chunks] or [pa.array([], pa.int32())]).to_numpy()


class AnswerWriter:
    """Appends answers to shards of its own process; each is on disk when `write` returns.

    Args:
        process: which of several; their shards do not meet.
        provenance: kept in the metadata of every shard.
    """

    def __init__(self, folder: str | Path, process: int, provenance: dict[str, Any]) -> None:
        self.folder, self.process = Path(folder), process
        self.schema = SCHEMA.with_metadata({"provenance": json.dumps(provenance)})
        self._path: Path | None = None
        self._sink: Any = None
        self._stream: Any = None
        self._written = 0

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):  # a full disk has no room for an end either: `mend` gives the shard one
            with contextlib.suppress(OSError):
                if self._sink is not None:
                    self._sink.close()
        else:
            self._close()

    def write(self, answer: dict[str, Any]) -> None:
        if self._stream is None or self._written >= _SHARD_ANSWERS:
            self._close()
            ensure_room(self.folder, _ROOM)
            self._open()
        self._stream.write_batch(pa.RecordBatch.from_pylist([answer], self.schema))
        self._sink.flush()
        self._written += 1

    def _open(self) -> None:
        taken = [int(path.stem.split("-")[2]) for path in _shards(self.folder) if int(path.stem.split("-")[1]) == self.process]
        self._path = self.folder / f"answers-{self.process:03d}-{max(taken, default=-1) + 1:05d}.arrow"
        self._sink = self._path.open("wb")
        self._stream, self._written = pa.ipc.new_stream(self._sink, self.schema), 0

    def _close(self) -> None:
        if self._path is not None:
            self._stream.close()
            self._sink.close()
            _write_whole(self._path)
            self._path = self._stream = None


def mend(folder: str | Path) -> None:
    """Write anew every shard that an interruption left without its end; nobody may be writing.

    Raises:
        UsageError: a shard is damaged otherwise: nothing of it is given up unasked.
    """
    for leftover in Path(folder).glob("answers-*.arrow.part"):
        leftover.unlink()
    for path in _shards(Path(folder)):
        if not _read_stream(path)[1]:
            _write_whole(path)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers-*-*.arrow"))


def _read_stream(path: Path) -> tuple[list[pa.RecordBatch], bool]:
    """The batches that are whole, and whether the stream has its end.

    Raises:
        UsageError: the file has its end, but cannot be read up to it, or is of something else: no interruption does that.
    """
    batches: list[pa.RecordBatch] = []
    data = path.read_bytes()
    source, read = pa.BufferReader(data), 0
    try:
        with pa.ipc.open_stream(source) as stream:
            if not stream.schema.equals(SCHEMA):
                raise UsageError(f"{path} is no shard of answers: its fields are {', '.join(stream.schema.names)}")
            while True:
                read = source.tell()
                batch = stream.read_next_batch()
                batch.validate(full=True)  # offsets are trusted from here on
                if any(column.null_count for column in (*batch.columns, batch["prompt_ids"].flatten(), batch["answer_ids"].flatten())):
                    raise pa.ArrowInvalid("a field of an answer is empty")
                batches.append(batch)
    except StopIteration:
        return batches, data.endswith(_END)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if data.endswith(_END) or not _torn(data[read:]):
            raise UsageError(
                f"{path} is damaged behind its first {sum(batch.num_rows for batch in batches)} answers ({' '.join(str(error).split())}): "
                "put a whole copy in its place, or remove it, and distill makes its answers anew"
            ) from error
        return batches, False


def _torn(rest: bytes) -> bool:
    """Whether these bytes are the beginning of a message of a stream, and not all of it."""
    if not rest.startswith(_MESSAGE[: len(rest)]):
        return False
    try:
        pa.ipc.read_message(rest)
    except (pa.ArrowException, OSError, EOFError):
        return True
    return False


def _write_whole(path: Path) -> None:
    """One batch in place of many; a shard without a whole answer goes."""
    batches, _ = _read_stream(path)
    if not batches:
        path.unlink()
        return
    staging = path.with_name(path.name + ".part")
    table = pa.Table.from_batches(batches).combine_chunks()
    with staging.open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    os.replace(staging, path)
