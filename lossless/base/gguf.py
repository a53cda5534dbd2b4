"""GGUF files as ordinary models, and loaders that keep quiet.

Knows: how transformers dequantizes such a file, and whether its header can be read to its end. Does not know: where it came from.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import transformers
from gguf import GGUFReader, GGUFValueType
from huggingface_hub.utils import enable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UsageError


@contextlib.contextmanager
def quiet() -> Any:
    """Keep the loaders' weight-by-weight bars and notices off the user's terminal."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    enable_progress_bars()  # of the hub: a model takes a while to come
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def from_files(source: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, which tells in a warning of one line which weights the files have not: transformers gives them
    random numbers."""
    found: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model: PreTrainedModel = found[0]
    if missing := sorted(found[1]["missing_keys"]):
        warnings.warn(f"{source} lacks {len(missing)} of the model's weights, which are random numbers now: {missing[0]}, ...", stacklevel=3)
    return model


def load_gguf(folder: str, file: str, dtype: Any) -> PreTrainedModel:
    """Dequantize a GGUF file into an ordinary model (what HF returns refuses to be saved)."""
    loaded = from_files(folder, gguf_file=file, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model if dtype == "auto" else model.to(dtype)


def check_header(path: Path) -> None:
    """Raises UsageError for a file whose settings go on behind its end: the `gguf` package would count through an array there for hours."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).pass_by()
    except (ValueError, IndexError, RecursionError) as error:
        raise UsageError(f"{path} is broken, or no GGUF file: {error}") from error


class _Header:
    """The settings at the start of a GGUF file, passed by one after the other; ValueError or IndexError where they are none."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 8
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.order: Literal["little", "big"] = "little" if any(data[4:6]) else "big"  # as its version, a small number, is written

    def pass_by(self) -> None:
        tensors = self.number(8)
        for _ in range(self.number(8)):
            name = self.taken(self.number(8))
            kind, at = self.number(4), self.at
            self.value(kind)
            if name.endswith(b".block_count") and (layers := int.from_bytes(self.data[at : self.at], self.order)) > tensors:  # all would be made
                raise ValueError(f"it has {tensors} tensors, and says that it has {layers} layers")

    def number(self, size: int) -> int:
        return int.from_bytes(self.taken(size), self.order)

    def taken(self, size: int) -> bytes:
        self.skip(size)
        return self.data[self.at - size : self.at]

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise IndexError("its settings go on behind its end")

    def value(self, kind: int, count: int = 1) -> None:
        """So many settings of a kind."""
        number = GGUFReader.gguf_scalar_to_np.get(kind)  # type: ignore[call-overload]
        if number is not None:
            self.skip(count * numpy.dtype(number).itemsize)
        elif kind == GGUFValueType.STRING:
            for _ in range(count):
                self.skip(self.number(8))
        elif kind == GGUFValueType.ARRAY:
            for _ in range(count):
                self.value(self.number(4), self.number(8))
        else:
            raise ValueError(f"a setting is of the unknown kind {kind}")
