"""Runs a command of the package, or its tests, as on a processor that has AVX2 and nothing newer:

    python -m tests.avx2 bench --dtype float32 ...
    python -m tests.avx2 pytest tests/test_exact.py

Knows: how torch, its libraries, our own kernels and bitsandbytes are told so. Does not know: how such a processor's clock and memory differ.
"""

from __future__ import annotations

import os
import sys

HELD = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "LOSSLESS_CC": f"{os.environ.get('LOSSLESS_CC', 'gcc')} -mno-avx512f",
}
os.environ.update(HELD)  # read when torch is imported

import bitsandbytes.nn.modules as four_bits
import pytest

from lossless.cli.parser import main

four_bits.has_avx512bf16 = lambda: False  # its own kernel for 4 bits takes AVX-512

if __name__ == "__main__":
    # pytest is told late: what is imported above it cannot rewrite any more
    before = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main([*before, *sys.argv[2:]]) if sys.argv[1:2] == ["pytest"] else main(sys.argv[1:]))
