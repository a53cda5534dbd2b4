"""Rows of a pass in the very shapes that they would have in passes of their own.

Knows: that a row of a pass of several is often rounded otherwise than the same row alone, and how to call
attention and projections so that it is not. Does not know: models, trees, or which shapes are safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels.native import Paths


@dataclass(frozen=True)
class RowCall:
    """How a row is read alone: keys of which nodes are written to which depths first, and how long its text is then,
    counted from the end of the past."""

    writes: tuple[tuple[int, int], ...]  # (depth, node)
    length: int


def row_calls(paths: Sequence[Sequence[int]]) -> list[RowCall]:
    """The calls for rows that stand depth first, once for all layers of a pass.

    A row's keys must lie side by side, as in a text that was read row by row. So the path of the row is written behind the
    past, where the rows of this pass stand. Neighbours share most of their paths, and of those little is written.

    Args:
        paths: of each row, the rows from the root of the tree to itself.
    """
    standing, calls = list(range(len(paths))), []  # which row's keys stand in each place behind the past
    for path in paths:
        writes = tuple((depth, node) for depth, node in enumerate(path) if standing[depth] != node)
        for depth, node in writes:
            standing[depth] = node
        calls.append(RowCall(writes, len(path)))
    return calls


@dataclass(frozen=True)
class AloneRows:
    """Rows of a pass that are to be read as if each were a pass of its own; for each, the rows from the root of the tree to itself."""

    paths: Sequence[Sequence[int]]

    @cached_property
    def calls(self) -> list[RowCall]:
        """For an attention that takes one row at a time."""
        return row_calls(self.paths)

    @cached_property
    def tensors(self) -> Paths:
        """For one that takes all of them."""
        return Paths.of(self.paths)

    def lengths(self, past: int) -> list[int]:
        """Of each row's text."""
        return [past + len(path) for path in self.paths]


def one_by_one(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: Sequence[RowCall],
    start: Callable[[int], int],
) -> torch.Tensor:
    """Attention of each row in a call of its own, over keys of exactly its own text; in the end every key is where it was.

    Args:
        attend: `[1, heads, 1, head_dim]`, keys, values, length of the text -> `[1, 1, heads, head_dim]`.
        query: `[1, heads, rows, head_dim]`; key, value: `[1, kv_heads, past + rows, head_dim]`.
        start: length of a text -> the first of its keys that its last row is given.
    """
    past = key.shape[2] - len(calls)
    moved = any(call.writes for call in calls)
    own = (key[:, :, past:].clone(), value[:, :, past:].clone()) if moved else None
    outputs = []
    for row, call in enumerate(calls):
        if own is not None:
            for depth, node in call.writes:
                key[:, :, past + depth] = own[0][:, :, node]
                value[:, :, past + depth] = own[1][:, :, node]
        end = past + call.length
        given = slice(start(end), end)
        outputs.append(attend(query[:, :, row : row + 1], key[:, :, given], value[:, :, given], end))
    if own is not None:
        key[:, :, past:], value[:, :, past:] = own
    return torch.cat(outputs, dim=1)


def in_pieces(
    forward: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, main_rows: int, most: int
) -> torch.Tensor:
    """A projection over at most `most` of the main rows at a time; the rest (streams) in one call.

    rows: `[1, rows, in]` or `[rows, in]`.
    """
    flat = rows.flatten(0, -2)
    count, main = len(flat), min(main_rows, len(flat))
    if main <= most and main == count:
        return forward(rows)
    sizes = [most] * (main // most) + [main % most, count - main]
    # a piece is given the dimensions and the strides of a tensor of its own: others take slow ways
    done = [forward(piece.view(*rows.shape[:-2], -1, rows.shape[-1])) for piece in flat.split([n for n in sizes if n])]
    return torch.cat(done, dim=-2)


def apart(forward: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, main_rows: int, most: int, at: int) -> torch.Tensor:
    """A norm over at most `most` of the main rows at a time; the rest (streams) in one call. `rows`: a tensor whose rows stand in dimension `at`."""
    done = [forward(piece) for piece in rows.narrow(at, 0, main_rows).split(most, at)]
    if rows.shape[at] > main_rows:
        done.append(forward(rows.narrow(at, main_rows, rows.shape[at] - main_rows)))
    return torch.cat(done, dim=at)


def rows_at(tensor: torch.Tensor, counts: tuple[int, ...]) -> int | None:
    """In which dimension of what a norm is given the rows of a pass stand, of which there are as many as one of `counts`; None if that is not to
    be told. Heads of queries and keys may stand before rows or behind them, and be as many: then the strides tell."""
    found = [at for at in range(tensor.ndim - 1) if tensor.shape[at] in counts]
    if tensor.ndim >= 3 and tensor.shape[0] == 1:
        found = [at for at in found if at]
    if len(found) == 2 and tensor.stride(found[0]) != tensor.stride(found[1]):
        found.sort(key=tensor.stride, reverse=True)
        return found[0]
    return found[0] if len(found) == 1 else None
