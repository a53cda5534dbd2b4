"""GGUF files as ordinary models, and loaders that keep quiet.

Knows: how transformers dequantizes such a file. Does not know: where it came from.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedModel


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


def load_gguf(folder: str, file: str, dtype: Any) -> PreTrainedModel:
    """Dequantize a GGUF file into an ordinary model (what HF returns refuses to be saved)."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model if dtype == "auto" else model.to(dtype)
