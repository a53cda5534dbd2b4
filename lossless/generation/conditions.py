"""What arithmetic depends on besides the weights: settings that may change between two calls, and all that a measurement on disk holds for.

Knows: where torch, transformers and a base keep what decides how a number is rounded. Does not know: what was measured.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..base.layers import device_of, input_device
from ..base.loading import precision
from ..base.packed import copied_bytes, is_packed, product_dtype
from ..base.processes import device_name
from ..base.structure import listeners
from ..kernels import gpu, native
from ..storage import versions
from ..streams.runner import StreamRunner

# variables that have a library round otherwise
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")


def conditions(base: Any) -> dict[str, Any]:
    """Under what a base computes now; asked for at each call, so it takes microseconds. Autocast is not among it: under autocast
    nothing is accelerated."""
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    gpu: Any = torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn
    return {
        "devices": [str(device_of(end)) for end in ends], "current": torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        "dtypes": [str(product_dtype(end) or end.weight.dtype) for end in ends],  # a packed weight is not unpacked for it
        "attention": base.config.get_text_config()._attn_implementation,
        "threads": torch.get_num_threads(),
        "products": [gpu.matmul.fp32_precision, mkldnn.matmul.fp32_precision, mkldnn.enabled],
        "attentions of torch": [gpu.flash_sdp_enabled(), gpu.mem_efficient_sdp_enabled(), gpu.math_sdp_enabled(), gpu.cudnn_sdp_enabled()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def under_autocast(base: Any) -> bool:
    """Whether torch would compute in another dtype than that of the base's weights."""
    return any(torch.is_autocast_enabled(kind) for kind in _kinds(base))


@contextlib.contextmanager
def without_autocast(base: Any) -> Iterator[None]:
    """Computing in the dtype of the weights."""
    with contextlib.ExitStack() as entered:
        for kind in _kinds(base):
            entered.enter_context(torch.autocast(kind, enabled=False))
        yield


def _kinds(base: Any) -> set[str]:
    """The kinds of device that a base computes on."""
    return {"cpu", *(device_of(end).type for end in (base.get_input_embeddings(), base.get_output_embeddings()))}


def circumstances(reader: StreamRunner, runner: StreamRunner) -> dict[str, Any]:
    """For JSON: what a base computes with here, apart from the numbers in its weights.

    Args:
        reader: passes in the base's own weights; runner: passes over trees.
    """
    base = reader.base
    config = reader.text_config.to_dict()
    # where it came from and under which name does not matter; how many layers it has does
    shape = {key: value for key, value in sorted(config.items()) if not key.startswith("_")}
    return conditions(base) | {
        "base": type(base).__name__, "shape": shape, "precision": precision(base), "device": device_name(input_device(base)),
        "capability": torch.backends.cpu.get_cpu_capability(), "packed": is_packed(base), "twin": runner is not reader, "copied": copied_bytes(runner.model),
        "modules": Counter(type(module).__name__ for module in runner.model.modules()), "fused": runner.fused, "heard": _heard(base), "kernels": [native.name(), input_device(base).type != "cpu" and gpu.available()],
        "adapter": reader.adapter.config.to_dict(), "versions": versions(),
        "code": _code(), "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }  # fmt: skip


def _heard(base: Any) -> dict[str, int]:
    """Modules that somebody hooked or patched, and how often: what a hook does may not show after a short text."""
    return {name: count for name, module in base.named_modules() if (count := listeners(module))}


@functools.cache
def _code() -> str:
    """This package as it is: another version of it may measure otherwise."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.[pch]*")):
        if path.suffix in (".py", ".c", ".h"):
            found.update(path.read_bytes())
    return found.hexdigest()


def file_name(depends: dict[str, Any]) -> str:
    """What holds under the same circumstances has the same name."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:16] + ".json"
