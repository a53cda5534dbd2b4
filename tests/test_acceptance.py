"""The walk emits what plain decoding would, whatever was drafted."""

from __future__ import annotations

import random

import pytest

from lossless.drafting.tree import DraftTree
from lossless.generation.acceptance import accept


def random_tree(rng: random.Random, root: int, size: int, vocabulary: int) -> DraftTree:
    tokens, parents, taken = [root], [-1], set()
    while len(tokens) < size:
        parent, token = rng.randrange(len(tokens)), rng.randrange(vocabulary)
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    return DraftTree(tuple(tokens), tuple(parents))


def base_choice(text: list[int]) -> int:
    """A stand-in for a base: any fixed function of the whole text."""
    return random.Random(str(text)).randrange(4)


@pytest.mark.parametrize("seed", range(30))
def test_walks_over_random_trees_spell_plain_decoding(seed: int) -> None:
    rng = random.Random(seed)
    plain = [2]
    for _ in range(60):
        plain.append(base_choice(plain))

    text, walks = [2], 0
    while len(text) <= 60:
        tree = random_tree(rng, text[-1], rng.randrange(1, 20), vocabulary=4)

        def choose(node: int) -> tuple[int, bool]:
            path = []
            while node:
                path.append(tree.tokens[node])  # noqa: B023
                node = tree.parents[node]  # noqa: B023
            # the text already ends with this path: the choice before it was its last token
            assert text[len(text) - len(path) :] == path[::-1]
            text.append(base_choice(text))
            return text[-1], False

        accepted = accept(tree, choose)
        assert len(accepted.tokens) == len(accepted.path)
        walks += 1
    assert text[:61] == plain
    assert walks < 60  # some drafts were right


def test_a_stop_ends_the_walk_though_the_draft_goes_on() -> None:
    tree = DraftTree((1, 2, 3, 4), (-1, 0, 1, 2))
    answers = iter([(2, False), (3, True)])
    accepted = accept(tree, lambda node: next(answers))
    assert accepted.path == (0, 1)
    assert accepted.tokens == (2, 3)
    assert accepted.stopped


def test_an_oracle_is_accepted_whole_and_a_liar_never() -> None:
    tree = DraftTree((1, 2, 3), (-1, 0, 1))
    assert accept(tree, lambda node: (node + 2, False)).tokens == (2, 3, 4)
    assert accept(tree, lambda node: (50, False)).tokens == (50,)
