"""Rows in shapes of their own: what attention and projections see, and that everything is put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lossless.drafting.tree import DraftTree
from lossless.streams.invariance import apart, in_pieces, one_by_one, row_calls, rows_at

TREE = DraftTree((11, 12, 13, 14, 15, 16), (-1, 0, 0, 1, 2, 3))
PATHS = [[i for i, seen in enumerate(row) if seen] for row in TREE.mask().tolist()]


def test_each_row_sees_its_own_text_side_by_side() -> None:
    past, rows = 5, len(TREE)
    columns = torch.arange(past + rows).float()
    key = columns.view(1, 1, -1, 1).repeat(1, 2, 1, 4)
    value, before = key + 100, key.clone()
    query = torch.arange(rows).float().view(1, 1, rows, 1).repeat(1, 4, 1, 4)
    seen: dict[int, list[int]] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
        assert torch.equal(v, k + 100)
        assert length == past + len(PATHS[int(q[0, 0, 0, 0])])
        seen[int(q[0, 0, 0, 0])] = k[0, 0, :, 0].int().tolist()
        return q.transpose(1, 2)

    out = one_by_one(attend, query, key, value, row_calls(PATHS), lambda length: max(0, length - 6))
    for row, path in enumerate(PATHS):
        assert seen[row] == [*range(past), *(past + node for node in path)][-6:]
    assert torch.equal(out, query.transpose(1, 2))
    assert torch.equal(key, before)
    assert torch.equal(value, before + 100)


def test_pieces_hold_so_many_main_rows_and_streams_go_together() -> None:
    sizes: list[int] = []
    projection = nn.Linear(6, 3)

    def forward(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.numel() // 6)
        return projection(rows)

    rows = torch.randn(1, 11, 6)
    for main, most, expected in [(7, 3, [3, 3, 1, 4]), (11, 4, [4, 4, 3]), (11, 11, [11]), (2, 8, [2, 9])]:
        sizes.clear()
        out = in_pieces(forward, rows, main, most)
        assert sizes == expected
        torch.testing.assert_close(out, projection(rows))
    assert in_pieces(forward, rows[0], 7, 3).shape == (11, 3)


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_rows_of_a_norm_are_found_however_heads_stand(heads: int) -> None:
    rows = torch.randn(1, 4, heads, 6)  # as many heads as rows, too
    for given, at in ((rows, 1), (rows.transpose(1, 2), 2), (rows[0], 0), (rows.flatten(2), 1), (rows.flatten(2)[0], 0)):
        assert rows_at(given, (4, 4)) == at
        seen: list[torch.Tensor] = []

        def norm(piece: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(piece)
            return piece * 2

        assert torch.equal(apart(norm, given, 3, 1, at), given * 2)
        assert [piece.shape[at] for piece in seen] == [1, 1, 1, 1]
    assert rows_at(torch.randn(5, 6), (4, 4)) is None
    assert rows_at(torch.randn(4 * heads, 6), (4, 4)) == (0 if heads == 1 else None)
