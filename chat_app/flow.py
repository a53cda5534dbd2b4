"""What happens on the page when something is asked: one picture of it after the other, as plain values by name.

Knows: the engine, a session, the order of things, how often to tell. Does not know: Gradio, or what stands where.

A picture has only what changed: `chat` and `twin` (messages), `status`, `headline`, `figures`, `acceptance`, `badge` (Markdown), `curves`
(rows of a plot), `key` (what its lines are), `tokens` (with their signs), `box` (the text that is being written), `busy` (something is
under way), `replay` (there is something to replay), `refused` (a sentence).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from lossless.errors import UsageError

from . import render
from .answer import Answer, Comparison, Waiting
from .session import Session, Turn
from .settings import Settings

Picture = dict[str, Any]

ACCELERATED, PLAIN, COMPARE = "Accelerated", "Plain", "Compare"
FEW_CORES = (os.cpu_count() or 1) < 4  # model and browser take them from each other, and what is drawn slows what is measured
BEAT_S = 0.25 if FEW_CORES else 0.1  # between two pictures
SLOW_BEAT_S = 2.0 if FEW_CORES else 1.0  # between two of what costs more: the plot and its like
SETTLE_S = 0.3  # before answers that are compared: the first of them is not to be timed while the page draws the message
LONGEST_REPLAY_S = 20.0


class _Pace:
    """Lets pictures through that are due; drawing must not take the time of the model that is measured.

    Args:
        beats: between two of them.
    """

    def __init__(self, beats: int = 1) -> None:
        self._beats = beats
        self._last = self._last_slow = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._beats * BEAT_S:
            return False
        self._last = now
        return True

    def slow_due(self) -> bool:
        now = time.monotonic()
        if now - self._last_slow < SLOW_BEAT_S:
            return False
        self._last_slow = now
        return True


def conversation(session: Session, twin: bool = False) -> list[dict[str, str]]:
    """The messages of a session; `twin` has the plain model's where the two were compared."""
    shown: list[dict[str, str]] = []
    for turn in session.turns:
        text = (turn.other or "") if twin else turn.text
        note = "not compared" if twin and turn.other is None else turn.note
        said = render.with_note(text, note) or "…"
        shown += [{"role": "user", "content": render.as_text(turn.message)}, {"role": "assistant", "content": said}]
    return shown


def idle(session: Session) -> Picture:
    """Everything as it is when nothing is under way."""
    return {"chat": conversation(session), "twin": conversation(session, twin=True), "busy": False}


def blank() -> Picture:
    """What is told of an answer, when there is none."""
    empty = dict.fromkeys(("status", "badge", "figures", "key", "acceptance"), "")
    return empty | {"replay": False, "tokens": [], "curves": render.curves([])}


def ask(
    engine: Any, session: Session, message: str, mode: str, settings: dict[str, Any], system: str = "", at: int | None = None
) -> Iterator[Picture]:  # fmt: skip
    """Answer a message; with `at`, in place of that turn and all behind it.

    What is refused changes nothing, and stays in the box.
    """
    keep = session.turns[:at]
    try:
        chosen = Settings(**settings)
        messages = session.messages(message, system, at)
        engine.check(messages, chosen)
        run = session.begin()
        begun = _begun(engine, session, run, mode, messages, chosen)
    except UsageError as error:
        sentence = f"{str(error)[0].upper()}{str(error)[1:]}."
        yield idle(session) | {"status": render.as_text(sentence), "refused": sentence} | ({} if at is None else {"box": message})
        return
    session.turns, session.shown = [*keep, turn := Turn(message, other="" if mode == COMPARE else None)], None
    yield idle(session) | {"busy": True, "replay": False, "badge": "", "status": "Reading …"} | ({"box": ""} if at is None else {})
    if mode == COMPARE:
        yield from _compare(engine, session, run, turn, begun)
    else:
        yield from _answer(engine, session, run, turn, begun)


def _begun(
    engine: Any, session: Session, run: threading.Event, mode: str, messages: list[dict[str, str]], settings: Settings
) -> Iterator[Any]:  # fmt: skip
    """The engine's pictures. Raises UsageError if it takes no more."""
    if mode == COMPARE:
        return iter(engine.compare(messages, settings, conversation=session.kept, cancelled=run.is_set))
    way = "plain" if mode == PLAIN else "accelerated"
    return iter(engine.answer(messages, settings, way=way, conversation=session.kept, cancelled=run.is_set))


def _answer(engine: Any, session: Session, run: threading.Event, turn: Turn, pictures: Iterator[Any]) -> Iterator[Picture]:
    pace, last = _Pace(), None
    for picture in pictures:
        if session.run is not run:  # another message took its place, or the visitor left
            return
        if isinstance(picture, Waiting):
            yield {"status": render.waiting(picture)}
            continue
        last, turn.text = picture, picture.text
        if picture.ending is None and pace.due():
            yield _live(session, picture, engine.plain_tokens_per_s, pace.slow_due())
    if session.run is not run:
        return
    _note(turn, last)
    session.shown = last
    if last is None:
        yield idle(session) | {"status": "Stopped."}
    else:
        yield _live(session, last, engine.plain_tokens_per_s, slow=True) | idle(session)


def _live(session: Session, answer: Answer, plain_per_s: float | None, slow: bool) -> Picture:
    picture: Picture = {
        "chat": conversation(session),
        "status": render.status(answer, plain_per_s),
        "headline": render.headline(answer, plain_per_s),
        "figures": render.figures(answer, plain_per_s),
    }
    if slow:
        picture |= {"curves": render.curves([answer]), "key": render.key([answer]), "acceptance": render.acceptance(answer)}
    if answer.ending is not None:  # hundreds of coloured parts: once
        picture["tokens"] = render.coloured(answer)
    return picture


def _note(turn: Turn, answer: Answer | None) -> None:
    """Beside the text of an answer, what a reader must know of its end."""
    if answer is None or answer.ending == "cancelled":
        turn.note = "stopped" if turn.text else "stopped before the first token"
    elif answer.ending == "error":
        turn.note = f"no answer: {render.as_text(answer.why)}"
    elif answer.ending == "length":
        turn.note = "cut at the most tokens asked for"


def _compare(engine: Any, session: Session, run: threading.Event, turn: Turn, pictures: Iterator[Any]) -> Iterator[Picture]:
    pace = _Pace(beats=2)
    first: Answer | None = None
    run.wait(SETTLE_S)
    for picture in pictures:
        if session.run is not run:
            return
        if isinstance(picture, Waiting):
            yield {"status": render.waiting(picture)}
        elif isinstance(picture, Comparison):
            session.shown = picture
        elif picture.way == "accelerated":
            first, turn.text = picture, picture.text
            if pace.due():
                yield _side(session, first, None, engine.plain_tokens_per_s, pace.slow_due())
        else:
            turn.other = picture.text
            if pace.due() and first is not None:
                yield _side(session, first, picture, engine.plain_tokens_per_s, pace.slow_due())
    if session.run is not run:
        return
    comparison = session.shown
    _note(turn, comparison.accelerated if isinstance(comparison, Comparison) else first)
    if not isinstance(comparison, Comparison):
        yield idle(session) | {"status": "Stopped: nothing to compare.", "badge": ""}
        return
    yield result(session, comparison, engine.plain_tokens_per_s) | {"busy": True, "replay": False}
    if render.finished(comparison.accelerated) and render.finished(comparison.plain):
        yield from _race(session, run, comparison)
        if session.run is not run:
            return
    yield result(session, comparison, engine.plain_tokens_per_s)


def _side(session: Session, first: Answer, other: Answer | None, plain_per_s: float | None, slow: bool) -> Picture:
    """While the two of a comparison are made, one after the other. No more than this: what is drawn slows both, and the replay shows all."""
    now = first if other is None else other
    where = "1 of 2, accelerated" if other is None else "2 of 2, plain"
    text: Picture = {"chat": conversation(session)} if other is None else {"twin": conversation(session, twin=True)}
    picture = text | {"status": f"{where} · {render.status(now, None if other else plain_per_s)}"}
    if slow:
        picture |= {"headline": render.side(now, next_is_plain=other is None), "figures": render.duel(first, other)}
    return picture


def result(session: Session, comparison: Comparison, plain_per_s: float | None) -> Picture:
    """A comparison that is over."""
    one, other = comparison.accelerated, comparison.plain
    ratio = comparison.speedup
    return idle(session) | {
        "status": "Compared" + (f" · {render.in_words(ratio).lower()}" if ratio else ""),
        "headline": render.verdict(comparison),
        "figures": render.duel(one, other),
        "acceptance": render.acceptance(one),
        "badge": render.badge(comparison),
        "curves": render.curves([one, other]),
        "key": render.key([one, other]),
        "tokens": render.coloured(one),
        "replay": render.finished(one) and render.finished(other),
    }


def replay(engine: Any, session: Session) -> Iterator[Picture]:
    """Both answers of the last comparison again, from the beginning, together."""
    comparison = session.shown
    if not isinstance(comparison, Comparison):
        return
    run = session.begin()
    yield from _race(session, run, comparison)
    if session.run is run:
        yield result(session, comparison, engine.plain_tokens_per_s)


def _race(session: Session, run: threading.Event, comparison: Comparison) -> Iterator[Picture]:
    """Pictures of both answers by their recorded clocks, in step; a stop goes to the end."""
    one, other = comparison.accelerated, comparison.plain
    longest = max(one.seconds, other.seconds)
    rate = max(1.0, longest / LONGEST_REPLAY_S)
    faster = f", {rate:.1f} times as fast as it was" if rate > 1 else ""
    begun, pace = time.monotonic(), _Pace()
    while not run.is_set() and (now := (time.monotonic() - begun) * rate) < longest:
        sides = render.until(one, now), render.until(other, now)
        picture: Picture = {
            "chat": _with_last(conversation(session), sides[0]),
            "twin": _with_last(conversation(session, twin=True), sides[1]),
            "status": f"Replay{faster} · {now:.1f} s · accelerated {_progress(sides[0], one)} · plain {_progress(sides[1], other)}",
            "busy": True,
            "replay": False,
        }
        if pace.slow_due():
            picture |= {"curves": render.curves(sides), "key": render.key(sides)}
        yield picture
        run.wait(BEAT_S)


def _progress(now: Answer, whole: Answer) -> str:
    return f"{len(now.tokens):,}/{len(whole.tokens):,}" + (" ✓" if len(now.tokens) == len(whole.tokens) else "")


def _with_last(messages: list[dict[str, str]], answer: Answer) -> list[dict[str, str]]:
    return [*messages[:-1], {"role": "assistant", "content": render.as_text(answer.text) or "…"}]
