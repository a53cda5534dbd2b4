"""The bound that a probe finds at a few positions holds at thousands."""

from __future__ import annotations

import pytest

from .noise import DTYPES, attach, observe

# models of other people's making warn of their own matters
pytestmark = pytest.mark.filterwarnings("ignore")

# one of each kind: plain, a table of positions, biases by distance, windows, experts, attention of its own
KINDS = ["llama", "gpt2", "mpt", "gemma2", "mixtral", "falcon"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KINDS)
def test_the_bound_holds_at_a_thousand_positions(family: str, dtype: str) -> None:
    if (family, dtype) == ("mixtral", "bfloat16"):
        pytest.skip("in 16 bits a router's own near-tie sends a token to another expert: no bound holds, and bitwise is the default")
    found = observe(attach(family, DTYPES[dtype]), texts=2)
    assert found.positions > 1000
    assert found.worst <= found.bound, found
