"""What older processors are served with, on a newer one that is held to what they have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lossless.kernels import native

from .older import HELD
from .tables import ROOT


@pytest.mark.parametrize("held", HELD)
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not native.available(), reason="nothing to hold: the other tests see what there is"
)
def test_an_exact_twin_and_a_whole_answer(held: str) -> None:
    """Products, norms, attention, layers, 4 bits and answers in 16 bits, bit for bit, in torch's order there."""
    if held == "avx512" and not native.compiled().lossless_pairs():
        pytest.skip("nothing to hold: the other tests see what there is")
    some = "beside_any_number or own_path or nearly_cancel or norms_have or fused_layers_have or four_bit or answers_are or another_order or prompts_are"
    if held == "avx512":  # float16 goes as it does without
        some = f"not torch.float16 and ({some})"
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of these tests
    command = [sys.executable, "-m", "tests.older", held, "pytest", "tests/test_exact.py", "tests/test_grids.py", "-k", f"{some} or test_grids"]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    known = ("bitsandbytes has torch multiply in float32", "torch's own product of several rows", "torch's attention has another order")
    assert all(any(reason in line for reason in known) for line in skipped), skipped
