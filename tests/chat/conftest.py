"""An engine over the tiny model, and what an answer must be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chat_app.answer import Info
from chat_app.engine import Engine
from chat_app.settings import Settings
from lossless.adapter.compat import new_adapter
from lossless.base.loading import Base, load_base
from lossless.distillation.prompts import encode
from lossless.generation.model import accelerate
from tests.conftest import tiny_config


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def expected(base: Base, messages: Any, settings: Settings) -> list[int]:
    """The tokens that the base's own `generate` gives, alone, reading everything."""
    ids = torch.tensor([base.tokenizer(messages)["input_ids"] if isinstance(messages, str) else encode(base.tokenizer, messages)])
    how: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        how = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    torch.manual_seed(settings.seed)
    found = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_tokens, **how)
    return list(found[0, ids.shape[1] :].tolist())


def last(events: Iterator[Any]) -> Any:
    """What an iterator ends with."""
    for event in events:
        found = event
    return found


def until(holds: Callable[[], bool], looks: int = 600) -> None:
    """Returns once it does; the test fails if it never does, looking twenty times a second."""
    for _ in range(looks):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("what should have happened did not")


class Hold:
    """A `cancelled` that lets an answer go on to a certain point, and no further until it is released."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.calls = after, 0
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self) -> bool:
        self.calls += 1
        if self.calls > self.after:
            self.reached.set()
            assert self.released.wait(20)
        return False


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder), "float32")


def engine_over(base: Base, adapted: bool = True, **how: Any) -> Engine:
    fast = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1)) if adapted else None
    return Engine(base.model, base.tokenizer, fast, Info("tiny", "random" if adapted else "", context=512), **how)


@pytest.fixture(scope="module")
def engine(base: Base) -> Iterator[Engine]:
    made = engine_over(base)
    yield made
    made.close()


@pytest.fixture
def in_background() -> Iterator[Callable[[Iterator[Any]], list[Any]]]:
    """Drains an iterator in a thread of its own; the list that it returns grows meanwhile."""
    threads = []

    def start(events: Iterator[Any]) -> list[Any]:
        found: list[Any] = []
        threads.append(threading.Thread(target=lambda: found.extend(events)))
        threads[-1].start()
        return found

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
