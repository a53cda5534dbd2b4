"""What the page says of itself, and proposes to ask.

Knows: sentences. Does not know: Gradio, or anything that is measured.
"""

from __future__ import annotations

from . import render
from .answer import Info

EXAMPLES = (
    ("Code", "Write a Python function that returns the first n Fibonacci numbers as a list."),
    ("List", "List the twelve months of the year, each with its number of days."),
    ("Count", "Count from 1 to 60, separated by commas."),
    (
        "Rewrite",
        "Repeat this text and correct its spelling: Their are many raesons to lern a new langage. It opens doors, it sharpens the mind, "
        "and it is fun.",
    ),
    ("Harder: free verse", "Write a short poem about the sea at night, without rhymes."),
    ("Harder: invention", "Invent three words that do not exist, and say what each means."),
)

SIGNS = (
    "Every token with the sign of where it came from: **0** the model's own choice, **1**, **2**, … drafted by that stream of the adapter, "
    "**t** drafted from the text itself. Every draft here equalled the model's choice. One pass of the model gave the tokens up to "
    "and with each **0**. "
    "“·” is a space, “↵” a new line."
)

ASK = "### What shall it answer?"
TWIN = "### The plain model\n\nThe same message, answered by it alone."
WELCOME = (
    "## The same words, sooner\n\nAn adapter drafts several tokens at once; the model checks them in one pass and keeps those that it "
    "would have chosen. Send a message, and its figures stand here while it is answered. *Compare* answers twice, with and without drafts, checks "
    "every token, and shows both side by side."
)
WELCOME_PLAIN = "## The model alone\n\nSend a message, and the figures of its answer stand here."


def training(model: str) -> str:
    """How to get an adapter for a model that has none: Markdown."""
    name = render.as_text(model)
    return (
        f"**{name}** has no adapter yet, so it answers alone. Three commands make one and open this page with it:\n\n```bash\n"
        f"lossless distill --model {name} --prompts tatsu-lab/alpaca --self-drawn 2000 --answer-tokens 3000000 --batch-size 64 "
        f"--out runs/answers\n"
        f"lossless train --model {name} --data runs/answers --out runs/adapter --steps 3000 --visit-every 3\n"
        f"python -m chat_app --model {name} --adapter runs/adapter\n```"
    )


def about(info: Info) -> str:
    """The model and how it runs, on one line: Markdown."""
    parts = [info.name, info.adapter and f"adapter: {info.adapter}", info.precision, "packed" if info.packed else "", info.device]
    parts += [render.count(info.threads, "thread"), f"exact: {info.exact}" if info.adapter else "no adapter"]
    return "# lossless\n\n" + render.as_text(" · ".join(part for part in parts if part))
