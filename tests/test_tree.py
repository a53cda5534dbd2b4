"""The tree is a tree, and it holds the likeliest paths."""

from __future__ import annotations

import pytest

from lossless.drafting.tree import DraftTree
from lossless.errors import UsageError


def test_mask_shows_ancestors_and_self() -> None:
    tree = DraftTree((5, 6, 7, 8, 9), (-1, 0, 0, 1, 3))
    assert tree.mask().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert tree.depths == (0, 1, 1, 2, 3)
    assert DraftTree((5, 6), (-1, 0)).mask(4).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_child_is_found_by_token() -> None:
    tree = DraftTree((5, 6, 7, 6), (-1, 0, 0, 2))
    assert (tree.child(0, 6), tree.child(2, 6), tree.child(1, 6), tree.child(0, 5)) == (1, 3, None, None)


@pytest.mark.parametrize(
    ("tokens", "parents", "rule"),
    [
        ((), (), "root"),
        ((1, 2), (-1,), "a parent for each token"),
        ((1, 2), (0, 0), "root"),
        ((1, 2, 3), (-1, 2, 0), "before its child"),
        ((1, 2, 2), (-1, 0, 0), "same token"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: tuple[int, ...], parents: tuple[int, ...], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        DraftTree(tokens, parents)
