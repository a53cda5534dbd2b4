"""Tokens become text: each says what it added, and together they say all of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from chat_app.progress import Detokenizer


def bytes_only() -> PreTrainedTokenizerFast:
    """A token for each byte, and one that ends texts."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZER = bytes_only()


@given(st.text(max_size=60))
def test_pieces_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    # a text that ends with the sign for what is no character looks as if its last one were half
    assert "".join(pieces) == (text[:-1] if text.endswith("\N{REPLACEMENT CHARACTER}") else text)


@given(st.lists(st.integers(0, 255), max_size=80))
def test_any_bytes_at_all(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    whole = TOKENIZER.decode(ids)
    assert "".join(pieces) in (whole, whole[:-1])


@pytest.mark.parametrize(("text", "pieces"), [("aé", ["a", "", "é"]), ("\N{GRINNING FACE}b", ["", "", "", "\N{GRINNING FACE}", "b"])])
def test_a_character_belongs_to_the_token_that_completes_it(text: str, pieces: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.add(token) for token in TOKENIZER(text)["input_ids"]] == pieces


def test_special_tokens_add_nothing() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add(TOKENIZER.eos_token_id) == ""
    assert detokenizer.add(TOKENIZER("a")["input_ids"][0]) == "a"
