"""What is said of answers, without a page."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from chat_app import render
from chat_app.answer import Answer, Comparison, Waiting
from lossless.generation.stats import Step

from .fake import PASS_S, REPLY, recorded

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a </b> <!-- c --> <?php", "&lt;b&gt; &#60;", "![x](http://example.com/x.png)", "```html\n<b>\n```"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_has_no_markup_left_and_comes_back_as_it_was(text: str) -> None:
    safe = render.as_text(text)
    assert not re.search(r"<[A-Za-z/!?]|&#?\w+;|!\[", safe)
    assert safe.replace(render.JOINER, "") == text
    assert render.as_written(safe) == text


def test_plain_text_is_left_alone() -> None:
    for text in ("a < b && c > d", "x <- 3", "wow! [a](b)", "R&D **bold** `code`", REPLY):
        assert render.as_text(text) == text


@pytest.mark.parametrize(("text", "shown"), [
    ("", "*stopped*"), ("a", "a\n\n*stopped*"), ("```\nx", "```\nx\n```\n\n*stopped*"), ("```\nx\n```\ny", "```\nx\n```\ny\n\n*stopped*"),
    ("~~~~\n```\n", "~~~~\n```\n\n~~~~\n\n*stopped*"),
])  # fmt: skip
def test_a_note_is_no_part_of_the_code_before_it(text: str, shown: str) -> None:
    assert render.with_note(text, "stopped") == shown
    assert render.with_note(text, "") == text


def test_a_quotation_stays_in_its_code_span() -> None:
    assert render.quoted("a`b\n<b>").count("`") == 2
    assert render.quoted("  ") == "`··`"


@pytest.mark.parametrize(("ratio", "words"), [(2.961, "2.96 times as fast"), (1.0, "As fast as plain"), (0.93, "0.93 times: slower here")])
def test_slower_is_called_slower(ratio: float, words: str) -> None:
    assert render.in_words(ratio) == words


def test_the_headline_says_why_it_was_slow() -> None:
    plain_per_s = 1 / PASS_S["plain"]
    alone = recorded(REPLY, drafts=False)
    assert "slower here" in render.headline(alone, plain_per_s)
    assert f"{len(alone.steps) - 1:,} of {len(alone.steps) - 1:,} steps were plain" in render.headline(alone, plain_per_s)
    drafted = recorded(REPLY)
    assert "too few for what a pass over drafts costs" in render.headline(drafted, 1000.0)
    assert "times as fast" in render.headline(drafted, plain_per_s)
    assert "not yet measured" in render.headline(drafted, None)


def test_no_answer_and_no_drafts_are_said_in_a_sentence() -> None:
    answer = recorded(REPLY)
    assert "out of memory" in render.headline(replace(answer, ending="error", why="out of memory"), 20.0)
    assert "Not accelerated" in render.headline(replace(answer, served=False, why="a cache of a fixed size"), 20.0)
    assert "Stopped" in render.headline(replace(answer, ending="cancelled"), 20.0)
    assert "Reading" in render.headline(Answer("accelerated"), None)


def test_figures_are_the_answers_own() -> None:
    answer = recorded(REPLY)
    said = render.figures(answer, 20.0)
    assert answer.tokens_per_s is not None
    assert answer.acceptance_length is not None
    for value in (f"{answer.tokens_per_s:.1f}", "20.0", f"{answer.acceptance_length:.2f}", "0.20 s", str(answer.passes_saved)):
        assert f"**{value}**" in said
    assert f"**{render.NONE}** tokens/s, plain model" in render.figures(answer, None)
    assert "speedup" not in render.figures(recorded(REPLY, "plain"), None)


def test_acceptance_by_depth() -> None:
    answer = recorded(REPLY)
    said = render.acceptance(answer)
    for depth, share in enumerate(answer.accepted_at_depth(), 1):
        assert re.search(rf"\| {depth} \| .* \| {share:.0%} \|", said)
    assert "No step took drafts" in render.acceptance(recorded(REPLY, drafts=False))


def test_a_table_of_depths_is_bounded() -> None:
    step = Step(0, tuple(range(20)), (*(-1 for _ in range(19)), 0), 19, 1.0)
    said = render.acceptance(Answer("accelerated", steps=(Step(0, (1,), (0,), 0, 0.5), step)))
    assert said.count("100%") == render.MOST_DEPTHS
    assert "depth 19" in said


def test_a_comparison_of_equals() -> None:
    one, other = recorded(REPLY), recorded(REPLY, "plain")
    comparison = Comparison(one, other)
    assert render.badge(comparison) == f"✓ **Identical** {len(one.tokens)}/{len(other.tokens)} tokens"
    assert f"{other.seconds / one.seconds:.2f} times as fast" in render.verdict(comparison)


def test_a_comparison_that_differs_shows_where_and_no_speedup() -> None:
    comparison = Comparison(recorded("one two three"), recorded("one two four", "plain"), margin=0.0123)
    said = render.badge(comparison)
    assert "from token 3" in said
    assert "` three`" in said
    assert "` four`" in said
    assert "0.0123 logits" in said
    assert "No speedup" in render.verdict(comparison)
    assert "ends" in render.badge(Comparison(recorded("one two"), recorded("one two three", "plain")))


@pytest.mark.parametrize("ending", ["cancelled", "error"])
def test_a_comparison_that_was_not_finished_has_no_speedup(ending: str) -> None:
    comparison = Comparison(recorded(REPLY), replace(recorded(REPLY, "plain"), ending=ending, why="out of memory"))
    assert comparison.speedup is None
    assert "No comparison" in render.verdict(comparison)
    assert "Not finished" in render.badge(comparison)


def test_an_unfinished_comparison_that_differs_is_not_called_identical() -> None:
    comparison = Comparison(replace(recorded("one two three"), ending="cancelled"), recorded("one four five", "plain"))
    assert "identical so far" not in render.badge(comparison)
    assert "token 2" in render.badge(comparison)


def test_tokens_have_the_sign_of_their_source() -> None:
    answer = recorded(REPLY)
    shown = render.coloured(answer)
    assert [mark for _, mark in shown][:8] == ["0", "1", "0", "0", "1", "2", "3", "0"]
    assert "t" in {mark for _, mark in shown}
    assert len(shown) == len(answer.tokens)
    assert all(piece.strip(" ") for piece, _ in shown)
    assert render.coloured(replace(recorded("a b"), pieces=("", " \n")))[0][0] == "◌"


def test_many_tokens_are_bounded() -> None:
    assert len(render.coloured(recorded("word " * 3000))) == render.MOST_COLOURED
    assert len(render.curves([recorded("word " * 3000, "plain")])) <= 203


def test_curves_end_at_the_answers_ends() -> None:
    sides = recorded(REPLY), recorded(REPLY, "plain")
    rows = render.curves(sides)
    for answer in sides:
        last = rows[rows.answer == answer.way].iloc[-1]
        assert last.tokens == len(answer.tokens)
        assert last.seconds == pytest.approx(answer.seconds, abs=1e-3)


def test_an_answer_at_a_moment() -> None:
    answer = recorded(REPLY)
    assert render.until(answer, 0.1).text == ""
    half = render.until(answer, 0.2 + 3.5 * PASS_S["accelerated"])
    assert len(half.steps) == 4
    assert answer.text.startswith(half.text)
    assert half.ending is None
    assert render.until(answer, 99) is answer


def test_the_place_in_the_queue() -> None:
    assert render.waiting(Waiting(2)) == "Waiting: 2 answers before yours."
    assert render.waiting(Waiting(1)) == "Waiting: 1 answer before yours."
