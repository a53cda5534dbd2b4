"""What is published is whole: a wheel of this checkout, used where nothing else of it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

from .tables import ROOT


@pytest.mark.commands
def test_a_wheel_is_small_and_works_by_itself(tmp_path: Path) -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"pyproject.toml takes setuptools 77 or newer to build, this is {setuptools.__version__}")
    source = tmp_path / "source"  # a build leaves files beside what it builds
    for folder in ("lossless", "chat_app"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 16 * 2**20
    packed = zipfile.ZipFile(wheel)
    inside = set(packed.namelist())
    missing = {str(p.relative_to(ROOT)) for folder in ("lossless", "chat_app") for end in ("py", "c", "h") for p in (ROOT / folder).rglob(f"*.{end}")} - inside
    assert not missing
    assert {"lossless/py.typed", "lossless/kernels/kernels.c", "lossless/adapters/demo/adapter.safetensors"} <= inside
    assert not any(name.startswith(("tests/", "data/")) for name in inside)
    packed.extractall(tmp_path / "alone")
    check = "import lossless, lossless.cli.parser, chat_app; print(lossless.__file__); from lossless.adapter.hub import shipped_adapter; print(shipped_adapter('demo'))"
    alone = os.environ | {"PYTHONPATH": str(tmp_path / "alone")}
    said = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert all(line.startswith(str(tmp_path / "alone")) for line in said.stdout.splitlines())
