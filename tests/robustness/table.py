"""The README's table of the last long runs, made of the JSON files beside it: `python -m tests.robustness.table` writes it.

Knows: the findings' fields and Markdown. Does not know: what was run.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- runs: written by python -m tests.robustness.table -->", "<!-- end of runs -->"


def made() -> str:
    """What the JSON files say."""
    lines = ["| run | with | found | failed | seconds | torch, transformers |", "|---|---|---|---|---|---|"]
    where = set()
    for path in sorted(HERE.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        counts = [f"{count:,} {kind}" for kind, count in run["counts"].items() if kind != "failed"]
        measured = [f"{key}: {value}" for key, value in run["measured"].items() if key in ("memory behind each quarter, MiB", "at most in it", "level")]
        asked = ", ".join(f"{key} {value}" for key, value in run["settings"].items())
        lines.append(f"| {path.stem} | {asked} | {'; '.join(counts + measured)} | {run['counts'].get('failed', 0)} | {run['seconds']:,.0f} | {run['versions']['torch']}, {run['versions']['transformers']} |")
        where.add(f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] != 1)}, Python {run['versions']['python']}")
    return "\n".join([*lines, "", *sorted(f"On {each}." for each in where)])


def current() -> str:
    """What the README says."""
    return (HERE / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    before, _, rest = (HERE / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    (HERE / "README.md").write_text(f"{before}{BEGIN}\n{made()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
