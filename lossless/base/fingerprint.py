"""What identifies a base, so that an adapter or stored answers are not taken for another's.

Knows: which marks dtype and quantization leave alone. Does not know: adapters.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel


def fingerprint(model: PreTrainedModel, tokenizer: Any = None) -> dict[str, Any]:
    """What identifies a base, whatever dtype or quantization it was loaded in.

    `weights` holds directions of 32 rows of the input embeddings (which 4-bit and 8-bit loading
    leave alone): row . probe / |row|, so that rounding moves an entry by about 1e-3 and another
    model's entries by about 1. `tokenizer` and `chat_template` are sha256 digests.
    """
    with align_module_device(model.get_input_embeddings()):  # Accelerate may keep the weight elsewhere
        rows: Any = model.get_input_embeddings().weight
        index = torch.linspace(0, rows.shape[0] - 1, 32, device=rows.device).long()
        sample = rows.detach()[index].to("cpu", torch.float64)  # [32, dim]
    probe = torch.cos(torch.arange(sample.shape[1], dtype=torch.float64) * 1.7)
    config = model.config.get_text_config()
    found: dict[str, Any] = {
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": rows.shape[0],
        "weights": [round(x, 4) for x in (sample @ probe / sample.norm(dim=1).clamp_min(1e-9)).tolist()],
    }
    if tokenizer is not None:
        numbers = tokenizer.get_vocab()
        # the `repr` of pairs that are never made: a hundred thousand of them set off the garbage collector
        pairs = (f"({token!r}, {numbers[token]!r})" for token in sorted(numbers, key=numbers.__getitem__))
        found["tokenizer"] = _sha256(f"[{', '.join(pairs)}]")
        found["chat_template"] = _sha256(str(tokenizer.chat_template))
    return found


def _numbers(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(each, int | float) for each in found)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_differences(ours: Any, theirs: Any) -> list[str]:
    """The names of the entries in which two fingerprints differ; entries that only one has do not count.

    One of them may come from a file: what is no fingerprint differs as a whole.
    """
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ["fingerprint"]
    differing = []
    for key in sorted(ours.keys() & theirs.keys()):
        if key == "weights" and all(_numbers(each[key]) for each in (ours, theirs)):
            same = len(ours[key]) == len(theirs[key]) and all(
                math.isclose(a, b, abs_tol=0.01) for a, b in zip(ours[key], theirs[key], strict=True)
            )
        else:
            same = ours[key] == theirs[key]
        if not same:
            differing.append(key)
    return differing
