"""Rows of a pass in the very shapes that they would have in passes of their own.

Knows: that a row of a pass of several is often rounded otherwise than the same row alone, and how to call
attention and projections so that it is not. Does not know: models, trees, or which shapes are safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def one_by_one(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: Sequence[Sequence[int]],
    reach: Callable[[int], int],
) -> torch.Tensor:
    """Attention of each row in a call of its own, over keys of exactly its own text, without a mask.

    A row's keys must lie side by side, as in a text that was read row by row. So the path of the row is
    written behind the past, where the rows of this pass stand, and everything is put back in the end. Rows are
    taken depth first: neighbours share most of their paths.

    Args:
        attend: `[1, heads, 1, head_dim]`, keys, values -> `[1, 1, heads, head_dim]`.
        query: `[1, heads, rows, head_dim]`; key, value: `[1, kv_heads, past + rows, head_dim]`.
        paths: of each row, the rows from the root of the tree to itself.
        reach: length of a text -> the first of its keys that its last row may see.
    """
    past = key.shape[2] - len(paths)
    own: tuple[torch.Tensor, torch.Tensor] | None = None
    standing = list(range(len(paths)))  # which row's keys stand in each place behind the past
    outputs: list[torch.Tensor] = [query] * len(paths)
    for row in sorted(range(len(paths)), key=lambda row: tuple(paths[row])):
        for depth, node in enumerate(paths[row]):
            if standing[depth] != node:
                if own is None:
                    own = key[:, :, past:].clone(), value[:, :, past:].clone()
                key[:, :, past + depth] = own[0][:, :, node]
                value[:, :, past + depth] = own[1][:, :, node]
                standing[depth] = node
        end = past + len(paths[row])
        start = reach(end)
        outputs[row] = attend(query[:, :, row : row + 1], key[:, :, start:end], value[:, :, start:end])
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
