"""Runs a command of the package, or its tests, as on a processor that has nothing newer than AVX2, or than AVX-512 without bfloat16:

    python -m tests.older avx2 bench --dtype float32 ...
    python -m tests.older avx512 pytest tests/test_exact.py

Knows: how torch, its libraries, our own kernels and bitsandbytes are told so. Does not know: how such a processor's clock and memory differ.
"""

from __future__ import annotations

import os
import sys

_COMPILER = os.environ.get("LOSSLESS_CC", "gcc")
HELD = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "LOSSLESS_CC": f"{_COMPILER} -mno-avx512f"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512", "LOSSLESS_CC": f"{_COMPILER} -mno-avx512bf16"},
}
if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in HELD:
        sys.exit(f"usage: python -m tests.older {{{','.join(HELD)}}} COMMAND ...")
    os.environ.update(HELD[sys.argv[1]])  # read when torch is imported

import bitsandbytes.nn.modules as four_bits
import pytest

from lossless.cli.parser import main

if __name__ == "__main__":
    four_bits.has_avx512bf16 = lambda: False  # its own kernel for 4 bits takes bfloat16 in AVX-512
    # pytest is told late: what is imported above it cannot rewrite any more
    before = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main([*before, *sys.argv[3:]]) if sys.argv[2:3] == ["pytest"] else main(sys.argv[2:]))
