"""Answers as what a page shows: Markdown, coloured tokens, rows of a plot.

Knows: `Answer`, `Comparison`, and how to say in words what they are. Does not know: Gradio, sessions, or where on the page anything
stands. Pure functions; text of users and models never leaves here as HTML, see `as_text`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pandas

from .answer import Answer, Comparison, Waiting

NONE = "\N{EN DASH}"  # a figure that was not measured
JOINER = "\u2060"  # has no width and allows no line break
MOST_COLOURED = 1200  # tokens; each is an element of the page
MOST_DEPTHS = 8  # rows of the table; copies of the text itself may go far deeper
OWN, RECALLED = "0", "t"  # signs of tokens; a draft has the number of its stream
STREAM_SIGNS = tuple(str(stream) for stream in range(1, 9))
_FENCE = re.compile(r"^[ ]*(`{3,}|~{3,})", re.MULTILINE)
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|!(?=\[)")


def as_text(text: str) -> str:
    """Markdown in which no HTML, entity or image is left: a word joiner parts the sign that would begin one from what follows.

    It shows as it was written, inside code as well, so that nothing hangs on where a renderer sees code; `as_written` takes it out.
    """
    return _MARKUP.sub(lambda found: found[0] + JOINER, text)


def as_written(text: str) -> str:
    """The inverse of `as_text`, for what comes back from the page."""
    return re.sub(f"([<&!]){JOINER}", r"\1", text)


def with_note(text: str, note: str) -> str:
    """A text of somebody else's as Markdown, and a sentence of ours behind it, outside of a code block that was not closed."""
    if not note:
        return as_text(text)
    opened = ""
    for fence in _FENCE.findall(text):
        opened = fence if not opened else "" if fence.startswith(opened) else opened
    return "\n\n".join([f"{as_text(text)}\n{opened}".rstrip()] * bool(text) + [f"*{note}*"])


def quoted(text: str) -> str:
    """A code span of Markdown, on one line, with its spaces kept."""
    line = text.replace("\n", "↵").replace("`", "'")
    return f"`{as_text(line)}`" if line.strip() else f"`{line.replace(' ', '·')}`"


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def waiting(wait: Waiting) -> str:
    return f"Waiting: {count(wait.place, 'answer')} before yours."


# --- how fast ---


def speedup(answer: Answer, plain_per_s: float | None) -> float | None:
    """Of decoding, against what the plain model gave per second on this machine; None while either was not measured."""
    if answer.way == "plain" or not plain_per_s or answer.tokens_per_s is None:
        return None
    return answer.tokens_per_s / plain_per_s


def finished(answer: Answer) -> bool:
    return answer.ending in ("stop", "length")


def in_words(ratio: float) -> str:
    """A speedup as it is read."""
    if ratio < 0.995:
        return f"{ratio:.2f} times: slower here"
    return "As fast as plain" if ratio < 1.005 else f"{ratio:.2f} times as fast"


def _stressed(ratio: float) -> str:
    return f"*{in_words(ratio)}*" if ratio < 0.995 else in_words(ratio)


def why_slow(answer: Answer) -> str:
    """What the steps say about an answer that was not faster."""
    steps = len(answer.steps) - 1
    if answer.plain_steps * 2 > steps:
        return f"Drafts do not pay on this text: {answer.plain_steps:,} of {count(steps, 'step')} were plain steps."
    gave = number(answer.acceptance_length, 2)
    return f"A pass gave {gave} tokens, too few for what a pass over drafts costs on this machine."


def headline(answer: Answer, plain_per_s: float | None) -> str:
    """One line and one sentence about an answer that is under way or over: Markdown."""
    if answer.ending == "error":
        return f"## No answer\n\n{as_text(answer.why)}"
    if answer.tokens_per_s is None and answer.ending is None:
        return f"## Reading\n\n{count(answer.prompt_tokens, 'token')} of the conversation." if answer.prompt_tokens else "## Reading"
    if answer.tokens_per_s is None:
        ended = "Stopped" if answer.ending == "cancelled" else "Ended"
        return f"## {count(len(answer.tokens), 'token')}\n\n{ended} before there was a speed."
    stopped = " Stopped by you." if answer.ending == "cancelled" else ""
    if answer.way == "plain":
        return f"## {number(answer.tokens_per_s)} tokens/s\n\nThe model alone, one token a pass.{stopped}"
    if not answer.served:
        return f"## Not accelerated\n\nThe model answered alone: {as_text(answer.why)}{stopped}"
    ratio = speedup(answer, plain_per_s)
    if ratio is None:
        unknown = "The plain model was not yet measured here: send a message in *Plain* or *Compare*."
        return f"## {number(answer.tokens_per_s)} tokens/s\n\n{unknown}{stopped}"
    reason = why_slow(answer) if ratio < 1.005 else "Against the plain model's tokens/s, as measured on this machine."
    return f"## {_stressed(ratio)}\n\n{reason}{stopped}"


def side(answer: Answer, next_is_plain: bool) -> str:
    """Headline while one of two answers is made that are to be compared: Markdown."""
    about = "With drafts. The plain model answers next." if next_is_plain else "The plain model, for comparison."
    return f"## {number(answer.tokens_per_s)} tokens/s\n\n{about}"


def verdict(comparison: Comparison) -> str:
    """Headline of a comparison: Markdown."""
    ratio = comparison.speedup
    if ratio is not None:
        reason = why_slow(comparison.accelerated) if ratio < 1.005 else "The same answer, whole, the time to its first token included."
        return f"## {_stressed(ratio)}\n\n{reason}"
    for answer in (comparison.accelerated, comparison.plain):
        if answer.ending == "error":
            return f"## No comparison\n\nThe {answer.way} answer failed: {as_text(answer.why)}"
        if not finished(answer):
            return f"## No comparison\n\nThe {answer.way} answer was stopped."
    return "## No speedup\n\nThe answers differ, so that their times say nothing."


def badge(comparison: Comparison) -> str:
    """Whether the tokens are the same, and if not, where they part: Markdown."""
    one, other, place = comparison.accelerated, comparison.plain, comparison.difference
    shared = min(len(one.tokens), len(other.tokens))
    if not (finished(one) and finished(other)) and place in (None, shared):
        return f"◐ **Not finished**: {count(shared, 'token')} compared, identical so far"
    if place is None:
        return f"✓ **Identical** {len(one.tokens):,}/{len(other.tokens):,} tokens"
    before = quoted("".join(one.pieces[max(0, place - 8) : place])) if place else "the beginning"
    sides = " · ".join(f"{side.way} {quoted(side.pieces[place]) if place < len(side.pieces) else 'ends'}" for side in (one, other))
    margin = NONE if comparison.margin is None else f"{comparison.margin:.3g} logits"
    return f"✗ **Different** from token {place + 1:,} on, after {before}: {sides}. The plain model preferred its own by {margin}."


# --- figures ---


def figures(answer: Answer, plain_per_s: float | None) -> str:
    """A Markdown list, one figure an item: the number in bold, then what it is."""
    live = answer.ending is None
    plain = answer.tokens_per_s if answer.way == "plain" and plain_per_s is None else plain_per_s
    kept = f" ({answer.cached_tokens:,} of {answer.prompt_tokens:,} prompt tokens were kept)" if answer.cached_tokens else ""
    made = len(answer.tokens)
    items = [
        (number(answer.now_per_s()), "tokens/s now") if live else (f"{made:,}", "token" if made == 1 else "tokens"),
        (number(answer.tokens_per_s), "tokens/s, this answer"),
        (number(plain), "tokens/s, plain model here"),
        (number(answer.first_s, 2, " s"), f"to the first token{kept}"),
    ]
    if answer.way == "accelerated":
        items += [
            (number(answer.acceptance_length, 2), "tokens a pass (acceptance length)"),
            (f"{answer.passes_saved:,}", "passes of the model saved"),
        ]
    return "\n".join(f"- **{value}** {what}" for value, what in items)


def duel(accelerated: Answer, plain: Answer | None) -> str:
    """The same figures of both answers: a Markdown table."""
    sides = [accelerated] if plain is None else [accelerated, plain]

    def row(what: str, values: Sequence[str]) -> str:
        return f"| {what} | " + " | ".join([*values, NONE][:2]) + " |"

    rows = [
        row("tokens", [f"{len(a.tokens):,}" for a in sides]),
        row("tokens/s", [number(a.tokens_per_s) for a in sides]),
        row("first token", [number(a.first_s, 2, " s") for a in sides]),
        row("whole answer", [number(a.seconds, 2, " s") for a in sides]),
        row("passes", [f"{a.target_passes:,}" for a in sides]),
        row("tokens a pass", [number(a.acceptance_length, 2) for a in sides]),
    ]
    return "\n".join(["| | accelerated | plain |", "|:--|--:|--:|", *rows])


def acceptance(answer: Answer) -> str:
    """What the acceptance length means here, and which share of drafts was accepted at each depth: Markdown."""
    length = answer.acceptance_length
    if answer.way == "plain" or length is None:
        return "The plain model gives one token a pass."
    lines = [
        f"Each pass of the model gave **{length:.2f}** tokens on average: its own choice and the drafts before it that equalled its "
        "choices. "
        f"The plain model gives one. {answer.passes_saved:,} of {len(answer.tokens):,} passes were saved."
    ]
    if shares := answer.accepted_at_depth():
        deepest, shares = len(shares), shares[:MOST_DEPTHS]
        full = [round(share * 12) for share in shares]
        bars = [f"| {d} | {'█' * n}{'░' * (12 - n)} | {share:.0%} |" for d, (n, share) in enumerate(zip(full, shares, strict=True), 1)]
        lines.append("\n".join(["| depth | drafts accepted | of steps |", "|:--|:--|--:|", *bars]))
        if deepest > MOST_DEPTHS:
            lines.append(f"The deepest draft that was accepted stood at depth {deepest}.")
    elif answer.served:
        lines.append("No step took drafts.")
    return "\n\n".join(lines)


def status(answer: Answer, plain_per_s: float | None) -> str:
    """One line under the conversation, for those who do not see the figures."""
    if answer.ending == "error":
        return f"The answer failed: {as_text(answer.why)}"
    told = {None: "Answering", "stop": "Done", "length": "Ended at the most tokens asked for", "cancelled": "Stopped"}[answer.ending]
    parts = [told, count(len(answer.tokens), "token")]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if (ratio := speedup(answer, plain_per_s)) is not None:
        parts.append(in_words(ratio).lower())
    return " · ".join(parts)


# --- tokens and time ---


def sign(source: int) -> str:
    """Of where a token came from, as the legend has it."""
    return OWN if source == 0 else RECALLED if source < 0 else str(source)


def coloured(answer: Answer) -> list[tuple[str, str]]:
    """The newest tokens, each with its sign; blanks are made visible."""
    tokens = list(zip(answer.pieces, map(sign, answer.sources), strict=False))[-MOST_COLOURED:]
    return [(_visible(piece), mark) for piece, mark in tokens]


def _visible(piece: str) -> str:
    if not piece:
        return "◌"  # part of a character that a later token completes
    return piece.replace("\n", "↵\n").replace("\t", "⇥") if piece.strip(" ") else "·" * len(piece)


def curves(answers: Sequence[Answer]) -> pandas.DataFrame:
    """Tokens over time: columns `seconds`, `tokens` and `answer`, one row for each step of each answer, thinned to 200.

    Both ways are in it from the beginning: a plot gives colours to those that it first sees.
    """
    rows: list[tuple[float, int, str]] = [(0.0, 0, "accelerated"), (0.0, 0, "plain")]
    for answer in answers:
        totals = list(accumulate(len(step.tokens) for step in answer.steps))
        points = [(round(step.at_s, 3), total, answer.way) for step, total in zip(answer.steps, totals, strict=True)]
        thin = max(1, -(-len(points) // 200))
        rows += [p for i, p in enumerate(points) if i % thin == 0 or i == len(points) - 1]
    return pandas.DataFrame(rows, columns=["seconds", "tokens", "answer"])


def key(answers: Sequence[Answer]) -> str:
    """What the lines of the plot are, by where they end: Markdown, the accelerated one in italics, the plain one in bold."""
    marks = {"accelerated": "*", "plain": "**"}
    return " · ".join(f"{marks[a.way]}{a.way}{marks[a.way]} {count(len(a.tokens), 'token')} in {a.seconds:.2f} s" for a in answers)


def until(answer: Answer, at_s: float) -> Answer:
    """The answer as it was so many seconds after the call."""
    steps = tuple(step for step in answer.steps if step.at_s <= at_s)
    if len(steps) == len(answer.steps):
        return answer
    pieces = answer.pieces[: sum(len(step.tokens) for step in steps)]
    return replace(answer, steps=steps, pieces=pieces, text="".join(pieces), ending=None)
