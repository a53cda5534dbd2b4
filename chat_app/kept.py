"""Keys and values between the turns of a conversation, so that only what is new has to be read.

Knows: which text's rows a prompt can start from, copies of them, and how much may be kept in all. Does not know: how a text came
about. What is kept is never handed out, only copies: a call that fails or is cancelled can spoil nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(eq=False)
class _Text:
    """Rows of a text: those of `ids`, in order."""

    ids: tuple[int, ...]
    cache: DynamicCache
    used: int

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in _layers(self.cache))


class Conversation:
    """What one session keeps between its turns.

    Args:
        most: texts to keep: 1 for a conversation that only grows, more for programs that send several in turn.
    """

    def __init__(self, most: int = 1) -> None:
        self.most = most
        self.texts: list[_Text] = []  # least recently kept first


class Kept:
    """The texts of all conversations.

    Args:
        most_bytes: of keys and values in all; the least recently used texts are dropped beyond it.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._conversations: WeakSet[Conversation] = WeakSet()
        self._lock = threading.Lock()
        self._clock = itertools.count()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(text.nbytes for conversation in self._conversations for text in conversation.texts)

    def find(self, conversation: Conversation, ids: Sequence[int]) -> tuple[DynamicCache | None, int]:
        """The rows that a prompt can best start from, and how many of them: at least one token is left to read."""
        best, rows = None, 0
        for text in conversation.texts:
            if (common := min(_common(text.ids, ids), len(ids) - 1)) > rows:
                best, rows = text, common
        if best is None:
            return None, 0
        best.used = next(self._clock)
        return best.cache, rows

    def keep(self, conversation: Conversation, ids: Sequence[int], cache: DynamicCache) -> None:
        """Keep the rows of a text, in place of those of its beginnings; tokens without a row are left out."""
        rows = min(cache.get_seq_length(), len(ids))
        if surplus := cache.get_seq_length() - rows:
            cache.crop(-surplus)
        text = _Text(tuple(ids[:rows]), cache, next(self._clock))
        with self._lock:
            others = [other for other in conversation.texts if _common(other.ids, text.ids) < len(other.ids)]
            conversation.texts = [*others, text][-conversation.most :]
            self._conversations.add(conversation)
            self._drop()

    def _drop(self) -> None:
        held = [(text.used, conversation, text) for conversation in self._conversations for text in conversation.texts]
        excess = sum(text.nbytes for _, _, text in held) - self.most_bytes
        for _, conversation, text in sorted(held, key=lambda each: each[0]):
            if excess <= 0:
                return
            conversation.texts.remove(text)
            excess -= text.nbytes


def copied(cache: DynamicCache | None, rows: int) -> DynamicCache:
    """The first rows of a cache as one of its own; an empty one if there is none."""
    found = DynamicCache()
    layers: list[Any] = [] if cache is None else list(cache.layers)
    for number, layer in enumerate(layers):
        if layer.is_initialized:  # not a layer that the model passes over
            found.update(layer.keys[..., :rows, :].clone(), layer.values[..., :rows, :].clone(), number)
    return found


def keepable(model: Any) -> bool:
    """Whether every layer of the model keeps each row, so that a text can be gone on with from any of its places."""
    if getattr(model, "_is_stateful", False) or getattr(model.generation_config, "cache_implementation", None):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _layers(cache: Any) -> list[Any]:
    """Those that hold anything."""
    return [layer for layer in cache.layers if layer.is_initialized]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
