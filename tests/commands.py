"""Commands in one process of its own: a process takes seconds to begin, most of them torch's and transformers'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHILD = """
import contextlib, io, json, os, sys
from lossless.cli.parser import main
exec(sys.argv[1])
found = []
for arguments, changed in json.load(sys.stdin):
    os.environ.update(changed)
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        code = main(arguments)
    found.append((code, said.getvalue(), told.getvalue()))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


def run_all(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], environment: Mapping[str, str], before: str = "", cwd: Path | None = None
) -> list[Done]:
    """Commands one after the other, each with what it changes in the environment; before: Python that is run ahead of the first."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, before], input=json.dumps(commands), env=os.environ | dict(environment), cwd=cwd, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr
    return [Done(*each) for each in json.loads(child.stdout.splitlines()[-1])]
