"""Rows in shapes of their own: what attention and projections see, and that everything is put back."""

from __future__ import annotations

import torch
from torch import nn

from lossless.drafting.tree import DraftTree
from lossless.streams.invariance import in_pieces, one_by_one, row_calls

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
