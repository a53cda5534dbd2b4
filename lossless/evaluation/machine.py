"""What the machine can do at best: how fast it reads memory and multiplies, and what that allows a plain model.

Knows: processors, GPUs, two small measurements, and how to keep processors busy. Does not know: prompts, sides, or how fast a model really is.

A plain model reads all its weights for each token, so that the bandwidth of the memory bounds it: no loop that takes one
token a pass can be faster than bandwidth / bytes of weights. Weights small enough to stay in a cache escape that bound, and packed ones of fewer
bits (kernels/grids.py) have a higher one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..base.linears import FourBitLinear, PackedLinear
from ..base.loading import Base
from ..base.processes import of_processor
from ..kernels import native, panels

_READ_MIB = 512  # far more than the caches hold
_MATRIX = {"cpu": 1024, "cuda": 8192}  # rows and columns: large enough to fill the arithmetic, over in milliseconds
_BUDGET_S = 0.3  # of each measurement; a single try may take longer
_MOST_TRIES = 9
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "asimd", "bf16", "sve")  # as Linux calls them


def processor_flags() -> list[str]:
    """Vector and matrix instructions of the CPU that matter here, by the names that Linux gives them."""
    found = f"{of_processor('flags')} {of_processor('Features')}".split()
    return [flag for flag in _FLAGS if flag in found]


def ceiling(base: Base) -> dict[str, Any]:
    """Measure the machine, in a second or two, and tell what it allows one token a pass.

    Returns:
        `cpu_capability`, what torch's own kernels use; `processor_flags`; `pairs_of_bfloat16`, whether ours multiply such, None if there are none; `bandwidth_gb_s`, of reading memory;
        `gflops` of a matrix product in each dtype; `weights_mb`, bytes that a plain pass of `base` reads; and
        `one_row_tokens_per_s`, the most tokens a second with one token a pass: for `base` as it is loaded and for its
        weights in each dtype.
    """
    device = base.model.device
    bandwidth = read_bandwidth(device)
    weights, numbers = weights_read(base.model)
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor_flags": processor_flags(),
        "pairs_of_bfloat16": panels.multiplies_pairs(2) if native.available() else None,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "gflops": {name: round(matmul_flops(device, dtype) / 1e9, 1) for name, dtype in _DTYPES.items()},
        "weights_mb": round(weights / 1e6, 1),
        "one_row_tokens_per_s": {
            "as loaded": round(bandwidth / weights, 1),
            **{name: round(bandwidth / (numbers * dtype.itemsize), 1) for name, dtype in _DTYPES.items()},
        },
    }


def weights_read(model: Any) -> tuple[int, int]:
    """Bytes of the weights that a pass of one row reads, and how many numbers they hold (those packed in 4 bits as they lie there).

    Input embeddings count only where they are the output embeddings too: of others a pass reads a single row.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    packed = [m for m in model.modules() if isinstance(m, PackedLinear | FourBitLinear)]  # their weights are not parameters
    tied = outputs is not None and outputs not in packed and outputs.weight is inputs.weight
    read = [p for p in model.parameters() if tied or p is not inputs.weight]
    numbers = sum(m.in_features * m.out_features for m in packed)
    return sum(m.weight_bytes for m in packed) + sum(p.nbytes for p in read), numbers + sum(p.numel() for p in read)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large buffer reads."""
    buffer = torch.ones(_READ_MIB * 2**20 // 4, device=device)
    return buffer.numel() * buffer.element_size() / _seconds(buffer.sum, device)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product."""
    size = _MATRIX.get(device.type, _MATRIX["cpu"])
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix, device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The fastest of several tries, after one that is not counted: others on the machine can only make it slower."""
    took: list[float] = []
    for _ in range(_MOST_TRIES + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - started)
        if len(took) > 1 and sum(took) > _BUDGET_S:
            break
    return min(took[1:])


# ends with the process that it is told of, its parent, however that one ends
_NEVER_RESTS = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10**5))"


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes that never rest, for as long as this lasts."""
    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-S", "-c", _NEVER_RESTS, str(os.getpid())]))
            stack.callback(other.kill)
        yield


def process_peak_mib() -> float | None:
    """The most memory that this process has had resident since it began, all sides and loading included; None where the system does not tell."""
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # bytes there, KiB elsewhere
