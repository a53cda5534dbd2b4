"""Which versions of Python, torch and transformers the quick tests pass with: `python -m tests.versions`.

Each row is a virtual environment of its own, made and thrown away here; what is done is kept in the report, and the same command goes on.
An interpreter is looked for on the PATH (`python3.12`), or named: `--python 3.12=/path/to/python`. torch's builds for GPUs are several
gigabytes for each row.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lossless.base.processes import of_processor
from lossless.storage import read_json, write_json

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "data" / "reports" / "versions-tried.json"
ROWS = ("3.11 2.14.1 5.24.0", "3.13 2.15.0 5.24.0", "3.12 2.11.0 5.20.2", "3.11 2.13.0 5.17.0")
QUICK = "not conformance and not demo and not commands"
_LIMIT_S = 3600  # of an installation, or of the tests


def tried(python: str, torch: str, transformers: str, interpreter: str) -> dict[str, Any]:
    """One row: what was installed, and how many tests passed, failed and were skipped."""
    row: dict[str, Any] = {"python": python, "torch": torch, "transformers": transformers}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "venv" / "bin" / "python"
        pip = [str(run), "-m", "pip", "install", "-q"]
        wanted = [f"torch=={torch}", f"transformers=={transformers}", *_requirements()]
        own = ["--no-deps", "--ignore-requires-python", "-e", str(ROOT)]  # whatever bounds it has
        for command in ([interpreter, "-m", "venv", str(run.parents[1])], [*pip, *wanted], [*pip, *own]):
            made = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
            if made.returncode:
                reason = [line for line in made.stderr.splitlines() if "ERROR" in line] or made.stderr.splitlines()
                return row | {"installed": False, "why": reason[-1][:300]}
        started = time.perf_counter()
        tests = subprocess.run(
            [str(run), "-m", "pytest", "-n", "2", "-m", QUICK], cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", tests.stdout[-400:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", tests.stdout, re.MULTILINE)
    return row | {"installed": True, "exit": tests.returncode, "counts": counts, "failed": failed, "seconds": round(time.perf_counter() - started)}


def _requirements() -> list[str]:
    """What the tests need besides torch and transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["chat"], *extras["test"]]
    return [each for each in named if not re.match(r"(torch|transformers|lossless-streams)\b", each)]


def table(report: dict[str, Any]) -> str:
    """Markdown, a line for each row."""
    lines = ["| Python | torch | transformers | quick tests |", "|---|---|---|---|"]
    for row in report["rows"]:
        said = ", ".join(f"{count} {name}" for name, count in row["counts"].items()) if row["installed"] else f"not installed: {row['why']}"
        lines.append(f"| {row['python']} | {row['torch']} | {row['transformers']} | {said} |")
    return "\n".join([*lines, "", f"On {report['device']}."])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar='"PYTHON TORCH TRANSFORMERS"', help="what to try (%(default)s)")
    parser.add_argument("--python", nargs="+", default=[], metavar="VERSION=PATH", help="interpreters that are not on the PATH")
    parser.add_argument("--json", type=Path, default=REPORT, help="the report (%(default)s)")
    parser.add_argument("--again", action="store_true", help="also what the report has already")
    arguments = parser.parse_args(argv)
    named = dict(each.split("=", 1) for each in arguments.python)
    report = read_json(arguments.json) if arguments.json.is_file() else {"rows": []}
    report["device"] = f"{sys.platform}, {of_processor('model name')}"
    for wanted in tqdm(arguments.rows, unit="row"):
        python, torch, transformers = wanted.split()
        same = [row for row in report["rows"] if (row["python"], row["torch"], row["transformers"]) == (python, torch, transformers)]
        if same and not arguments.again:
            continue
        if (interpreter := named.get(python) or shutil.which(f"python{python}")) is None:
            parser.error(f"there is no python{python} on the PATH: name one with --python {python}=PATH")
        found = tried(python, torch, transformers, interpreter)
        report["rows"] = sorted([row for row in report["rows"] if row not in same] + [found], key=lambda row: (row["python"], row["torch"], row["transformers"]))
        write_json(arguments.json, report)
    print(table(report))
    return int(any(not row["installed"] or row["exit"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
