"""The tree is a tree, and it holds the likeliest paths."""

from __future__ import annotations

import pytest

from lossless.errors import UsageError
from lossless.tree import Candidate, DraftTree, most_likely, plant


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


def test_plant_takes_the_likeliest_paths_with_their_parents() -> None:
    candidates = [
        Candidate(10, -1, -0.1),
        Candidate(11, -1, -3.0),
        Candidate(12, 0, -0.2),
        Candidate(13, 0, -5.0),
        Candidate(14, 2, -0.2),  # as likely as its parent: certain
        Candidate(15, 1, -3.5),
    ]
    tree = plant(9, candidates, max_nodes=5)
    assert tree.tokens == (9, 10, 11, 12, 14)
    assert tree.parents == (-1, 0, 0, 1, 3)
    assert len(plant(9, candidates, max_nodes=99)) == 7
    assert plant(9, candidates, max_nodes=1) == DraftTree((9,), (-1,))


def test_most_likely_prefers_the_first_of_equals() -> None:
    candidates = [Candidate(1, -1, -1.0), Candidate(2, -1, -0.5), Candidate(3, -1, -1.0)]
    assert most_likely(candidates, range(3), 2) == [1, 0]
