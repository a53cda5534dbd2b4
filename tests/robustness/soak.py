"""Many threads taking turns on one accelerated model, for long: every answer the lone one, and memory flat.

    python -m tests.robustness.soak --seconds 1800 --threads 8 --json soak.json
    python -m tests.robustness.soak --model demo --dtype bfloat16 --seconds 1800 --threads 8

Knows: what is asked, what came when nobody else was asking, and the memory of this process. Does not know: how calls take turns.
"""

from __future__ import annotations

import os

# oneDNN keeps what it has compiled for each shape, for each thread and for all, up to 1,024 of them, and fills up slowly: what is looked for
# here is what grows besides. Read when torch is imported.
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tqdm import tqdm

from lossless.adapter.compat import new_adapter
from lossless.adapter.hub import shipped_adapter
from lossless.base.loading import load_base
from lossless.base.processes import give_back_memory
from lossless.generation.model import AcceleratedModel, accelerate

from ..conftest import VOCAB, build_tiny, tiny_config
from .report import Tally, own_cache, resident_mib

_GROWTH_MIB = 12.0  # that counts as flat, from behind the second quarter to behind the last
_QUESTIONS = 24


class Question:
    """One call, and its lone answer."""

    def __init__(self, fast: AcceleratedModel, number: int, vocabulary: int) -> None:
        rng = random.Random(number)
        self.ids = torch.randint(3, vocabulary, (1, rng.randint(3, 60)), generator=torch.Generator().manual_seed(number))
        self.options: dict[str, Any] = {"max_new_tokens": rng.randint(4, 32), "attention_mask": torch.ones_like(self.ids), "do_sample": number % 3 == 2}
        self.seed = number
        self.lone = self.ask(fast.base)

    def ask(self, model: Any) -> list[int]:
        """The answer of the base or of the accelerated model; sampled ones need the generator for themselves."""
        if self.options["do_sample"]:
            torch.manual_seed(self.seed)
        return list(model.generate(self.ids, **self.options)[0].tolist())


def soak(tally: Tally, fast: AcceleratedModel, vocabulary: int, seconds: float, threads: int, seed: int) -> None:
    """Ask for so long, from so many threads; one call in eight is of the base itself, in the middle of the others'."""
    questions = [Question(fast, number, vocabulary) for number in range(_QUESTIONS)]
    for question in questions:
        if question.ask(fast) != question.lone:
            tally.fail(f"question {question.seed}: the lone answer itself is another")
    dice, counted = threading.Lock(), threading.Lock()

    def ask_on(rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            question, model = rng.choice(questions), fast.base if rng.random() < 0.125 else fast
            try:
                if question.options["do_sample"]:
                    with dice:
                        found = question.ask(model)
                else:
                    found = question.ask(model)
                wrong = None if found == question.lone else f"{found}, alone {question.lone}"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            with counted:
                tally.done += 1
                tally.count("answers of the base itself" if model is fast.base else "accelerated answers")
                if wrong:
                    tally.fail(f"seed {seed}, question {question.seed}, {'the base' if model is fast.base else 'accelerated'}: {wrong}")

    busiest, quarters = list[float](), list[float]()
    with tqdm(total=round(seconds), unit="s", desc="soak") as bar:
        for quarter in range(4):
            until, memory = time.monotonic() + seconds / 4, [resident_mib()]
            running = [
                threading.Thread(target=ask_on, args=(random.Random(f"{seed}/{quarter}/{number}"), until)) for number in range(threads)
            ]
            for thread in running:
                thread.start()
            while (left := until - time.monotonic()) > 0:
                memory.append(resident_mib())
                bar.set_postfix(answers=tally.done, failed=tally.counts["failed"], MiB=f"{memory[-1]:.0f}")
                time.sleep(min(1.0, left))
                bar.update(min(bar.total - bar.n, 1))
            for thread in running:
                thread.join()
            del running, thread
            give_back_memory()
            busiest.append(round(max(memory), 1))
            quarters.append(round(resident_mib(), 1))
    growth = quarters[3] - quarters[1]
    tally.measured = {
        "memory behind each quarter, MiB": quarters, "at most in it": busiest, "growth, MiB": round(growth, 1), "level": fast.guarantee.level
    }  # fmt: skip
    if growth > _GROWTH_MIB:
        tally.fail(f"memory grew by {growth:.1f} MiB from the second to the last quarter: {quarters}")


def attached(model: str, dtype: str) -> Callable[[], tuple[AcceleratedModel, int]]:
    """What makes the model that is soaked, and the tokens that it is asked with."""

    def tiny() -> tuple[AcceleratedModel, int]:
        base = build_tiny(seed=5, hidden=128, inner=160).to(getattr(torch, dtype))  # heads of 32, which the kernels take
        return accelerate(base, new_adapter(base, tiny_config()).randomize(1)), VOCAB

    def loaded() -> tuple[AcceleratedModel, int]:
        base = load_base(model, dtype)
        return accelerate(base.model, shipped_adapter(model) or new_adapter(base.model, tiny_config()).randomize(1), base.tokenizer), 40_000

    return tiny if model == "tiny" else loaded


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.soak", description="many threads on one accelerated model")
    parser.add_argument("--seconds", type=float, default=1800, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--model", default="tiny", help="tiny, demo, or anything that lossless --model takes (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", metavar="OUT", help="the findings")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    tally = Tally("soak", {key: value for key, value in vars(arguments).items() if key != "json"})
    make = attached(arguments.model, arguments.dtype)
    if arguments.model == "tiny":
        with own_cache():
            soak(tally, *make(), arguments.seconds, arguments.threads, arguments.seed)
    else:
        soak(tally, *make(), arguments.seconds, arguments.threads, arguments.seed)
    return tally.close(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
