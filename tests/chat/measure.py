"""How the chat's figures compare with those of `lossless bench`, with a real model: `python -m tests.chat.measure --json OUT`.

In one process and over the same prompts, pair by pair: the speedup that a comparison of the page shows against the one that `bench` measures;
the accelerated answer's first token against the plain one's; how soon the page is there once the model is loaded; and what memory it
takes to answer many sessions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from tqdm.auto import tqdm

from chat_app.engine import load
from chat_app.settings import Settings
from lossless.base.loading import Base
from lossless.base.processes import device_name, give_back_memory
from lossless.distillation.prompts import read_prompts
from lossless.evaluation.bench import Decoding, bench
from lossless.storage import versions, write_json

from ..robustness.report import resident_mib
from .conftest import last
from .test_browser import served

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


def measure(model: str, dtype: str, limit: int, tokens: int) -> dict[str, Any]:
    engine = load(model, dtype=dtype)
    page_s = first_page_s(engine)
    prompts, settings = read_prompts([str(PROMPTS)], limit), Settings(temperature=0, max_tokens=tokens)
    base, decoding = Base(engine.model, engine.tokenizer, model), Decoding(max_new_tokens=tokens)
    rows = []
    for prompt in tqdm(prompts, unit="prompt"):
        [run] = bench(base, engine.fast, "shipped", [prompt], decoding, None)["runs"]  # type: ignore[arg-type]
        both = last(engine.compare(list(prompt.messages), settings))
        rows.append({
            "prompt": prompt.id, "identical": both.difference is None, "page": both.speedup, "bench": run["speedup"],
            "first token": both.accelerated.first_s / both.plain.first_s,
        })  # fmt: skip
    asked = [list(prompt.messages) for prompt in prompts]
    memory = [chat(engine, (asked * 20)[:20], Settings(temperature=0, max_tokens=32)) for _ in range(3)]
    median = {name: round(statistics.median(row[name] for row in rows), 3) for name in ("page", "bench", "first token")}
    return {
        "model": model, "precision": engine.info.precision, "device": device_name(torch.device(engine.model.device)), "threads": torch.get_num_threads(),
        "versions": versions(), "prompts": len(rows), "max_new_tokens": tokens, "identical": sum(row["identical"] for row in rows), "median": median,
        "page over bench": round(statistics.median(row["page"] / row["bench"] for row in rows), 3), "first page, s": round(page_s, 2),
        "memory after 20, 40 and 60 messages, MiB": memory, "rows": rows,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    memory = ", ".join(f"{each:,.0f}" for each in found["memory after 20, 40 and 60 messages, MiB"])
    lines = [
        "| | |", "|---|---|",
        f"| identical comparisons | {found['identical']} of {found['prompts']} |",
        f"| speedup that the page shows, median | {found['median']['page']:.2f} |",
        f"| speedup of `bench` on the same prompts, median | {found['median']['bench']:.2f} |",
        f"| the former over the latter, prompt by prompt, median | {found['page over bench']:.2f} |",
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
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="the report")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    found = measure(arguments.model, arguments.dtype, arguments.limit, arguments.max_new_tokens)
    print(table(found))
    if arguments.json:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
