"""Random calls of `generate`, and random damage to every file that is read.

    python -m tests.robustness.fuzz --calls 10000 --files 10000 --seed 0 --json fuzz.json
    python -m tests.robustness.fuzz --calls 124 --first-call 123 --seed 0       # case 123 again

Knows: how many cases, from which seed, and where the findings go. Does not know: what a call or a broken file is (calls.py, files.py).
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
from pathlib import Path

import transformers
from tqdm import tqdm

from lossless.errors import UsageError

from . import calls, files
from .report import Tally, own_cache

_SAVED_EVERY = 50  # cases


def fuzz_calls(tally: Tally, seed: int, first: int, end: int) -> None:
    """Cases from `first` to before `end`."""
    for number in tqdm(range(first, end), initial=first, total=end, unit="call", desc="calls"):
        case = calls.make(seed, number)
        try:
            outcome, wrong = calls.try_case(case)
        except Exception as error:  # a crash of ours, or of the harness: told, and the next one tried
            outcome, wrong = "failed", f"{type(error).__name__}: {error}"
        _note(tally, "calls", number, outcome, f"{case}: {wrong}" if wrong else None)


def fuzz_files(tally: Tally, seed: int, first: int, end: int) -> None:
    """Cases from `first` to before `end`."""
    with tempfile.TemporaryDirectory() as scratch:
        shelf = files.Shelf(Path(scratch))
        for number in tqdm(range(first, end), initial=first, total=end, unit="file", desc="files"):
            outcome, wrong = shelf.try_case(seed, number)
            _note(tally, "files", number, outcome, wrong)


def _note(tally: Tally, kind: str, number: int, outcome: str, wrong: str | None) -> None:
    if wrong:
        tally.fail(wrong)
    else:
        tally.count(f"{kind}: {outcome}")
    tally.measured[kind] = number + 1
    tally.done += 1
    if tally.done % _SAVED_EVERY == 0:
        tally.save()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description="random calls of generate, and broken files")
    parser.add_argument("--calls", type=int, default=10_000, help="the number of the last call, plus one (%(default)s)")
    parser.add_argument("--files", type=int, default=0, help="the number of the last broken file, plus one (%(default)s)")
    parser.add_argument("--first-call", type=int, default=0)
    parser.add_argument("--first-file", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", metavar="OUT", help="the findings; the same command goes on after them")
    arguments = parser.parse_args(argv)
    faulthandler.enable()  # what kills the process names its case by the progress line
    transformers.logging.set_verbosity_error()
    try:
        tally = Tally("fuzz", {"seed": arguments.seed}, arguments.json)
    except UsageError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    with own_cache():
        try:
            fuzz_calls(tally, arguments.seed, max(arguments.first_call, tally.measured.get("calls", 0)), arguments.calls)
            fuzz_files(tally, arguments.seed, max(arguments.first_file, tally.measured.get("files", 0)), arguments.files)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on", file=sys.stderr)
    return tally.close()


if __name__ == "__main__":
    sys.exit(main())
