"""Tokens become text: each says what it added, and together they say all of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from chat_app.progress import Detokenizer, Progress
from chat_app.settings import Settings
from lossless.generation.stats import Stats

HALF = "\N{REPLACEMENT CHARACTER}"


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
    assert "".join(pieces) == text.rstrip(HALF)


@given(st.lists(st.integers(0, 255), max_size=80))
def test_any_bytes_at_all(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == TOKENIZER.decode(ids).rstrip(HALF)


def bytes_in_place_of_characters() -> PreTrainedTokenizerFast:
    """As Llama's: words begin with a sign of their own, and a character that has no token is spelled out in bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "\u2581"]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


FALLING_BACK = bytes_in_place_of_characters()


@given(st.text(st.sampled_from("ab \u00e9\u20ac\N{GRINNING FACE}") | st.characters(codec="utf-8"), max_size=60))
@example("\N{GRINNING FACE}" * 9 + "\u00e9" * 11 + "a")
def test_characters_that_are_spelled_out_in_bytes(text: str) -> None:
    ids = FALLING_BACK(text)["input_ids"]
    detokenizer = Detokenizer(FALLING_BACK)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == FALLING_BACK.decode(ids).rstrip(HALF)


def test_a_character_in_bytes_belongs_to_the_last_of_them() -> None:
    detokenizer = Detokenizer(FALLING_BACK)
    pieces = [detokenizer.add(token) for token in FALLING_BACK("a\N{GRINNING FACE}\u00e9b")["input_ids"]]
    assert pieces == ["", "a", "", "", "", "\N{GRINNING FACE}", "", "\u00e9", "b"]


@pytest.mark.parametrize(("text", "pieces"), [("aé", ["a", "", "é"]), ("\N{GRINNING FACE}b", ["", "", "", "\N{GRINNING FACE}", "b"])])
def test_a_character_belongs_to_the_token_that_completes_it(text: str, pieces: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.add(token) for token in TOKENIZER(text)["input_ids"]] == pieces


def test_special_tokens_add_nothing() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add(TOKENIZER.eos_token_id) == ""
    assert detokenizer.add(TOKENIZER("a")["input_ids"][0]) == "a"


def test_passes_that_were_read_again_count_while_the_answer_grows() -> None:
    stats = Stats()
    progress = Progress("accelerated", TOKENIZER, Settings(), 10, frozenset(), lambda: False, lambda: stats)
    for rows in (0, 3, 2):  # the prompt's pass is counted apart
        progress(torch.tensor([[5]]))
        if rows:
            stats.count_alone(0, 5, rows, rows)
        else:
            stats.emit(0, (5,), (0,), 0)
        assert progress.picture().target_passes == stats.target_passes
    assert stats.target_passes == 5
    assert progress.picture().ending is None
