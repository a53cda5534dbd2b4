"""What happens on the page, picture by picture, and what the page is made of; no browser."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from chat_app import flow, render
from chat_app.answer import Answer, Comparison, Info
from chat_app.engine import Engine
from chat_app.flow import ACCELERATED, COMPARE, PLAIN
from chat_app.session import MOST_TURNS, Session, Turn
from chat_app.settings import MOST_CHARACTERS
from lossless.adapter.hub import shipped_adapter
from lossless.base.loading import Base
from lossless.generation.model import accelerate

from .fake import REPLY, FakeEngine, made

GREEDY = {"temperature": 0, "top_p": 1, "seed": 0, "max_tokens": 64}


@pytest.fixture(autouse=True)
def _no_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is due, and a replay takes no time that is worth waiting for."""
    monkeypatch.setattr(flow, "BEAT_S", 0.0)
    monkeypatch.setattr(flow, "LONGEST_REPLAY_S", 0.05)
    monkeypatch.setattr(flow, "SETTLE_S", 0.0)


def session() -> Session:
    return Session(object())


def asked(engine: Any, visitor: Session, message: str, mode: str = ACCELERATED, **rest: Any) -> dict[str, Any]:
    """Everything that the page shows when all is over."""
    shown: dict[str, Any] = {}
    for picture in flow.ask(engine, visitor, message, mode, GREEDY, **rest):
        shown |= picture
    return shown


def test_an_answer_grows_and_ends_as_the_engines() -> None:
    engine, visitor = FakeEngine(), session()
    pictures = list(flow.ask(engine, visitor, "hello", ACCELERATED, GREEDY))
    assert pictures[0]["busy"]
    assert pictures[0]["box"] == ""
    lengths = [len(picture["chat"][-1]["content"]) for picture in pictures[1:] if "chat" in picture]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    assert pictures[-1]["chat"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": REPLY}]
    assert pictures[-1]["figures"] == render.figures(visitor.shown, None)  # type: ignore[arg-type]
    assert pictures[-1]["busy"] is False


def test_turns_are_told_to_the_model_with_the_system_prompt() -> None:
    engine, visitor = FakeEngine(), session()
    asked(engine, visitor, "say: one")
    asked(engine, visitor, "say: two", PLAIN, system="Be brief.")
    assert engine.asked[-1] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "say: one"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "say: two"},
    ]  # fmt: skip


def test_hostile_text_reaches_the_model_as_written_and_the_page_as_text() -> None:
    engine, visitor = FakeEngine(), session()
    shown = asked(engine, visitor, "say: <script>alert(1)</script>")
    assert engine.asked[-1][-1]["content"] == "say: <script>alert(1)</script>"
    assert all("<script" not in message["content"] for message in shown["chat"])
    asked(engine, visitor, "more")
    assert engine.asked[-1][1]["content"] == "<script>alert(1)</script>"


@pytest.mark.parametrize(("message", "rule"), [
    ("word " * 500, "at most 400 tokens"), ("x" * (MOST_CHARACTERS + 1), "at most 100000 characters"), ("  ", "must not be empty"),
])  # fmt: skip
def test_what_is_refused_changes_nothing_and_stays_in_the_box(message: str, rule: str) -> None:
    engine, visitor = FakeEngine(), session()
    asked(engine, visitor, "hello")
    before = list(visitor.turns)
    shown = asked(engine, visitor, message)
    assert rule in shown["refused"]
    assert "box" not in shown
    assert shown["busy"] is False
    assert visitor.turns == before


def test_a_refused_setting_is_a_sentence() -> None:
    shown: dict[str, Any] = {}
    for picture in flow.ask(FakeEngine(), session(), "hello", PLAIN, GREEDY | {"temperature": None}):
        shown |= picture
    assert shown["refused"] == "Temperature must be a finite number, got None."


def test_a_refused_edit_goes_to_the_box_and_leaves_the_turns() -> None:
    engine, visitor = FakeEngine(), session()
    asked(engine, visitor, "one")
    asked(engine, visitor, "two")
    shown = asked(engine, visitor, "word " * 500, at=0)
    assert shown["box"].startswith("word")
    assert [turn.message for turn in visitor.turns] == ["one", "two"]


def test_an_edit_takes_the_place_of_a_turn_and_all_behind_it() -> None:
    engine, visitor = FakeEngine(), session()
    asked(engine, visitor, "one")
    asked(engine, visitor, "two")
    shown = asked(engine, visitor, "other", at=0)
    assert [turn.message for turn in visitor.turns] == ["other"]
    assert "box" not in shown  # what is being written there is not touched
    assert engine.asked[-1] == [{"role": "user", "content": "other"}]


def test_undo_gives_the_message_back() -> None:
    visitor = session()
    asked(FakeEngine(), visitor, "one")
    asked(FakeEngine(), visitor, "two")
    assert visitor.take_back(1) == "two"
    assert [turn.message for turn in visitor.turns] == ["one"]
    assert session().take_back(0) == ""


def test_a_conversation_is_bounded() -> None:
    visitor = session()
    visitor.turns = [Turn("a", "b")] * MOST_TURNS
    assert "clear it" in asked(FakeEngine(), visitor, "one more")["refused"]


def test_stop_keeps_what_came_and_the_next_message_goes_on() -> None:
    engine, visitor = FakeEngine(), session()
    pictures = flow.ask(engine, visitor, "hello", ACCELERATED, GREEDY)
    for picture in pictures:
        if len(picture.get("chat", [{"content": ""}])[-1]["content"]) > 20:
            visitor.stop()
    assert 0 < len(visitor.turns[0].text) < len(REPLY)
    assert visitor.turns[0].note == "stopped"
    assert engine.running == 0
    assert asked(engine, visitor, "say: fine")["chat"][-1]["content"] == "fine"


def test_who_leaves_frees_the_slot_and_nothing_is_written_any_more() -> None:
    engine, visitor = FakeEngine(), session()
    pictures = flow.ask(engine, visitor, "hello", ACCELERATED, GREEDY)
    for _ in range(4):
        next(pictures)
    text = visitor.turns[0].text
    visitor.leave()
    assert list(pictures) == []
    assert engine.running == 0
    assert visitor.turns[0].text == text


def test_the_place_in_the_queue_is_said() -> None:
    engine = FakeEngine()
    first = flow.ask(engine, session(), "hello", ACCELERATED, GREEDY)
    next(first), next(first)
    second = flow.ask(engine, (later := session()), "hello", ACCELERATED, GREEDY)
    next(second)
    assert next(second) == {"status": "Waiting: 1 answer before yours."}
    done = threading.Thread(target=list, args=(first,))
    done.start()
    assert [*second][-1]["status"].startswith("Done")
    done.join()
    assert later.turns[0].text == REPLY


def test_a_failure_is_a_sentence() -> None:
    shown = asked(FakeEngine(fails=True), session(), "hello")
    assert shown["status"] == "The answer failed: the model failed: out of memory"
    assert "No answer" in shown["headline"]


def test_a_comparison_is_followed_by_a_replay_of_both() -> None:
    visitor = session()
    pictures = list(flow.ask(FakeEngine(), visitor, "hello", COMPARE, GREEDY))
    assert isinstance(visitor.shown, Comparison)
    raced = [picture for picture in pictures if picture.get("status", "").startswith("Replay")]
    assert raced
    assert raced[0]["chat"][-1]["content"] == raced[0]["twin"][-1]["content"] == "…"
    assert raced[-1]["chat"][-1]["content"] == REPLY != raced[-1]["twin"][-1]["content"]  # the accelerated answer is there first
    last = pictures[-1]
    assert "Identical" in last["badge"]
    assert last["replay"]
    assert last["busy"] is False
    assert last["chat"][-1]["content"] == last["twin"][-1]["content"] == REPLY
    assert list(flow.replay(FakeEngine(), visitor))[-1]["headline"] == last["headline"]


def test_a_comparison_that_differs_goes_on_with_the_accelerated_answer() -> None:
    engine, visitor = FakeEngine(differs=True), session()
    shown = asked(engine, visitor, "hello", COMPARE)
    assert "Different" in shown["badge"]
    assert "No speedup" in shown["headline"]
    asked(engine, visitor, "next")
    assert engine.asked[-1][1]["content"] == REPLY


def test_a_stopped_comparison_has_no_speedup() -> None:
    visitor = session()
    pictures: Iterator[Any] = flow.ask(FakeEngine(), visitor, "hello", COMPARE, GREEDY)
    last: dict[str, Any] = {}
    for picture in pictures:
        last |= picture
        assert "not compared" not in last["twin"][-1]["content"]
        if picture.get("status", "").startswith("2 of 2"):
            visitor.stop()
    assert "times" not in last["status"]
    assert last["replay"] is False
    assert last["busy"] is False


def test_a_new_message_drops_the_replay() -> None:
    engine, visitor = FakeEngine(), session()
    asked(engine, visitor, "hello", COMPARE)
    assert asked(engine, visitor, "say: more")["replay"] is False
    assert list(flow.replay(engine, visitor)) == []


# --- the page itself ---

gradio = pytest.importorskip("gradio", reason="the page needs the extra `chat`")


def test_no_event_of_the_page_is_an_endpoint() -> None:
    from chat_app.page import build

    info = made(lambda: build(FakeEngine()).get_api_info())
    assert info["named_endpoints"] == {}
    assert info["unnamed_endpoints"] == {}


def test_without_an_adapter_the_page_is_plain_and_says_how_to_train_one() -> None:
    from chat_app.page import build

    def parts(engine: FakeEngine) -> tuple[Any, str]:
        blocks = made(lambda: build(engine)).blocks.values()
        mode = next(block for block in blocks if isinstance(block, gradio.Radio))
        return mode, "\n".join(str(block.value) for block in blocks if isinstance(block, gradio.Markdown))

    mode, text = parts(FakeEngine(adapter=""))
    assert (mode.value, mode.interactive) == (PLAIN, False)
    for command in ("lossless distill --model", "lossless train --model", "python -m chat_app --model"):
        assert command in text
    mode, text = parts(FakeEngine())
    assert (mode.value, mode.interactive) == (ACCELERATED, True)
    assert "lossless distill" not in text


def test_every_answer_says_that_nothing_is_to_be_fetched_from_elsewhere() -> None:
    from chat_app.page import mount

    fastapi, client = pytest.importorskip("fastapi"), pytest.importorskip("fastapi.testclient")
    page = client.TestClient(made(lambda: mount(fastapi.FastAPI(), FakeEngine()))).get("/")
    assert page.status_code == 200
    assert "img-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.g" not in page.text


def test_the_page_on_the_demo_model_shows_what_the_loop_counted(demo: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accelerate(demo.model, shipped_adapter("demo") or "", demo.tokenizer)
    engine = Engine(demo.model, demo.tokenizer, fast, Info("demo", "shipped", context=8192))
    visitor = Session(engine.conversation())
    with contextlib.closing(engine):
        for message in ("Name three colours.", "And three more?"):  # the second from kept rows
            shown = asked(engine, visitor, message, COMPARE)
            comparison = visitor.shown
            assert isinstance(comparison, Comparison)
            assert comparison.difference is None
            answer, stats = comparison.accelerated, fast.stats
            assert len(answer.tokens) == stats.tokens > 8
            assert answer.target_passes == stats.target_passes
            assert answer.acceptance_length == pytest.approx(stats.acceptance_length)
            decoding_s = stats.steps[-1].at_s - stats.steps[0].at_s  # by the loop's own clock
            assert answer.tokens_per_s == pytest.approx((stats.tokens - 1) / decoding_s)
            assert f"{answer.acceptance_length:.2f}" in shown["figures"]
            assert f"{len(answer.tokens)}/{len(answer.tokens)}" in shown["badge"]
        assert answer.cached_tokens > 10
        asked(engine, visitor, "Again.", ACCELERATED)
        assert isinstance(visitor.shown, Answer)
        assert visitor.shown.tokens == tuple(token for step in fast.stats.steps for token in step.tokens)
        assert engine.plain_tokens_per_s
