"""How the chat's figures compare with those of `lossless bench`, with a real model: `python -m tests.chat.measure --json OUT`.

In one process and over the same prompts, pair by pair: the speedup that the page shows of a comparison, in a browser on this machine if
there is Chromium, against the one that `bench` measures; the accelerated answer's first token against the plain one's; how soon the
page is there once the model is loaded; and what memory it takes to answer many sessions.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from tqdm.auto import tqdm

from chat_app.answer import Comparison
from chat_app.engine import load
from chat_app.settings import Settings
from lossless.base.loading import Base
from lossless.base.processes import device_name, give_back_memory
from lossless.distillation.prompts import read_prompts
from lossless.evaluation.bench import Decoding, bench
from lossless.evaluation.sides import ACCELERATED, STOCK
from lossless.storage import versions, write_json

from ..robustness.report import resident_mib
from .conftest import last
from .test_browser import CHROMIUM, Visitor, expect, playwright, served

PROMPTS = Path(__file__).parents[2] / "data" / "prompts.jsonl"
_SESSIONS = 4


def first_page_s(engine: Any) -> float:
    """From a loaded model to a page that is answered."""
    started = time.perf_counter()
    with served(engine) as address:
        httpx.get(address, timeout=60).raise_for_status()
        return time.perf_counter() - started


def chat(engine: Any, asked: list[list[dict[str, str]]], settings: Settings) -> float:
    """All conversations from several sessions at once; returns resident MiB afterwards."""

    def session(number: int) -> None:
        for messages in asked[number::_SESSIONS]:
            last(engine.answer(messages, settings, conversation=engine.conversation()))

    running = [threading.Thread(target=session, args=(number,)) for number in range(_SESSIONS)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    give_back_memory()
    return round(resident_mib(), 1)


def compared_on_the_page(engine: Any, asked: list[str]) -> list[tuple[float, Comparison]]:
    """For each message, alone in its conversation, in a browser: the speedup that is shown, and what the engine gave."""
    shown, given, compare = [], [], engine.compare

    def noted(*asked: Any, **rest: Any) -> Iterator[Any]:
        for event in compare(*asked, **rest):
            if isinstance(event, Comparison):
                given.append(event)
            yield event

    engine.compare = noted
    with served(engine) as address, playwright.sync_playwright() as made:
        visitor = Visitor(made.chromium.launch(executable_path=CHROMIUM), address)
        visitor.mode("Compare")
        for message in tqdm(asked, unit="prompt", desc="page"):
            visitor.send(message)
            expect(visitor.status).to_contain_text("Compared", timeout=600_000)
            numbers = re.findall(r"[0-9.]+", visitor.page.locator("#headline h2").inner_text())
            shown.append(float(numbers[0]) if numbers else 1.0)  # "as fast as plain"
            visitor.page.locator("#clear").click()
            expect(visitor.user).to_have_count(0)
    engine.compare = compare
    return list(zip(shown, given, strict=True))


def keep_picture(engine: Any, path: Path) -> None:
    """Of the page after a comparison of the README's own prompt."""
    with served(engine) as address, playwright.sync_playwright() as made:
        visitor = Visitor(made.chromium.launch(executable_path=CHROMIUM), address)
        visitor.mode("Compare")
        visitor.send("Why does bread rise?")
        expect(visitor.page.get_by_role("button", name="Replay again")).to_be_visible(timeout=600_000)
        visitor.page.mouse.move(0, 0)
        visitor.page.screenshot(path=path)


def compared(engine: Any, asked: list[str], settings: Settings) -> list[tuple[float, Comparison]]:
    """The same without a browser."""
    given = [last(engine.compare([{"role": "user", "content": message}], settings)) for message in tqdm(asked, unit="prompt", desc="engine")]
    return [(both.speedup, both) for both in given]


def row_of(prompt: str, shown: float, both: Comparison, sides: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The page counts the time to the first token, so what `bench` measured is taken with it, too."""
    whole = {name: side["time_to_first_token_s"] + side["decode_s"] for name, side in sides.items()}
    first, plain_first = both.accelerated.first_s or 0.0, both.plain.first_s or 1.0
    return {
        "prompt": prompt, "identical": both.difference is None, "page": shown, "bench": whole[STOCK] / whole[ACCELERATED],
        "decoding": sides[ACCELERATED]["speedup"], "first token": first / plain_first,
    }  # fmt: skip


def measure(model: str, dtype: str, limit: int, tokens: int, picture: Path | None) -> dict[str, Any]:
    engine = load(model, dtype=dtype)
    page_s = first_page_s(engine)
    if picture is not None:
        keep_picture(engine, picture)
    prompts, settings = [p for p in read_prompts([str(PROMPTS)], 4 * limit) if len(p.messages) == 1][:limit], Settings(temperature=0, max_tokens=tokens)
    base, decoding = Base(engine.model, engine.tokenizer, model), Decoding(max_new_tokens=tokens)
    asked = [prompt.messages[-1]["content"] for prompt in prompts]
    page = compared_on_the_page(engine, asked) if CHROMIUM else compared(engine, asked, settings)
    runs = engine._slot.call(lambda: bench(base, engine.fast, "shipped", prompts, decoding, None)["runs"])  # type: ignore[arg-type]  # where the model works
    rows = [row_of(prompt.id, shown, both, run["sides"]) for prompt, run, (shown, both) in zip(prompts, runs, page, strict=True)]
    memory = [chat(engine, ([[{"role": "user", "content": message}] for message in asked] * 20)[:20], Settings(temperature=0, max_tokens=32)) for _ in range(3)]
    median = {name: round(statistics.median(row[name] for row in rows), 3) for name in ("page", "bench", "decoding", "first token")}
    return {
        "model": model, "precision": engine.info.precision, "device": device_name(torch.device(engine.model.device)), "threads": torch.get_num_threads(),
        "versions": versions(), "browser": bool(CHROMIUM), "prompts": len(rows), "max_new_tokens": tokens, "identical": sum(row["identical"] for row in rows),
        "median": median, "page over bench": round(statistics.median(row["page"] / row["bench"] for row in rows), 3), "first page, s": round(page_s, 2),
        "memory after 20, 40 and 60 messages, MiB": memory, "rows": rows,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    memory = ", ".join(f"{each:,.0f}" for each in found["memory after 20, 40 and 60 messages, MiB"])
    where = "that the page shows in a browser on the same machine" if found["browser"] else "that the page would show, without a browser"
    lines = [
        "| | |", "|---|---|",
        f"| identical comparisons | {found['identical']} of {found['prompts']} |",
        f"| speedup {where}, median | {found['median']['page']:.2f} |",
        f"| speedup of `bench` on the same prompts, the time to the first token included, median | {found['median']['bench']:.2f} |",
        f"| the same of decoding alone | {found['median']['decoding']:.2f} |",
        f"| what the page shows over what `bench` measured, prompt by prompt, median | {found['page over bench']:.2f} |",
        f"| first token, accelerated over plain, median | {found['median']['first token']:.2f} |",
        f"| from the loaded model to the first page | {found['first page, s']:.1f} s |",
        f"| memory after 20, 40 and 60 messages from {_SESSIONS} sessions | {memory} MiB |",
    ]  # fmt: skip
    about = f"{found['model']}, {found['precision']}, {found['device']}, {found['threads']} threads, torch {found['versions']['torch']}"
    return "\n".join([*lines, "", f"{found['prompts']} prompts of `data/prompts.jsonl`, {found['max_new_tokens']} tokens, greedy; {about}."])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chat.measure", description="the chat's figures with a real model")
    parser.add_argument("--model", default="demo", help="(%(default)s)")
    parser.add_argument("--dtype", default="auto", help="(%(default)s)")
    parser.add_argument("--limit", type=int, default=8, help="prompts (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(%(default)s, as on the page)")
    parser.add_argument("--picture", type=Path, help="keep one of the page after a comparison (PNG)")
    parser.add_argument("--json", type=Path, help="the report")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)  # the tests take one
    found = measure(arguments.model, arguments.dtype, arguments.limit, arguments.max_new_tokens, arguments.picture)
    print(table(found))
    if arguments.json:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
