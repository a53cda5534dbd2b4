"""Broken files: every file that the package reads, damaged at random, and read again.

Knows: which files there are, how they are read, and what damage is. What a reader may do is give what it can, or say in one
sentence what is wrong (UsageError); nothing else in the folder changes then, and no code in a file is ever run. Does not know: how
many cases there are.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch

from lossless.adapter.compat import new_adapter
from lossless.adapter.weights import StreamAdapter
from lossless.base.fingerprint import fingerprint
from lossless.base.loading import Base, load_base
from lossless.distillation.answers import Answers, AnswerWriter, mend
from lossless.distillation.config import DistillConfig
from lossless.distillation.distill import distill
from lossless.distillation.prompts import Prompt, from_text, read_prompts
from lossless.drafting.costs import CostCurve
from lossless.errors import UsageError
from lossless.evaluation.bench import bench
from lossless.evaluation.certificate import asked, certify
from lossless.evaluation.timing import Decoding
from lossless.generation import measure, verdict
from lossless.generation.exactness import Guarantee
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.training.config import TrainConfig
from lossless.training.trainer import train

from ..conftest import save_gguf, save_tiny, tiny_config


class Trap:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.where),)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(max(1, len(data)))]


def flip(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 7, 100, 5000)))


def hole(data: bytes, rng: random.Random) -> bytes:
    """A block of zeros, as a crashed machine leaves it."""
    begin = rng.randrange(max(1, len(data)))
    end = min(len(data), begin + rng.choice((8, 512, 4096)))
    return data[:begin] + bytes(end - begin) + data[end:]


def lose(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(max(1, len(data)))
    return data[:begin] + data[begin + rng.choice((1, 8, 300)) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(max(1, len(data)))
    return data[:place] + rng.randbytes(rng.choice((1, 8, 300))) + data[place:]


_ODD = [None, True, -1, 0, 2**40, 1.5, float("nan"), "", "text", [], {}, [None], {"a": 1}, "\u0000", [[1, 2], 3], -(2**70)]


def swap(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file, or of one line of it, is of another kind, or gone."""
    lines = data.split(b"\n")
    with contextlib.suppress(ValueError):
        return json.dumps(_swapped(json.loads(data), rng)).encode()
    number = rng.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[number] = json.dumps(_swapped(json.loads(lines[number]), rng)).encode()
    return b"\n".join(lines)


def _swapped(found: Any, rng: random.Random) -> Any:
    if isinstance(found, dict | list) and found and rng.random() < 0.85:
        key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        if rng.random() < 0.1:
            del found[key]
        else:
            found[key] = _swapped(found[key], rng)
        return found
    return rng.choice(_ODD)


_DAMAGES = (cut, flip, noise, hole, lose, insert, swap, swap)


@dataclass
class Kind:
    """Files of one kind: a folder as it should be, its files that are damaged, and what reads it."""

    whole: Path
    files: list[str]
    read: Callable[[Path], Any]
    checks: Callable[[Any, str, Path, bytes], str | None] = lambda found, file, folder, damaged: None  # what is wrong with what was read


class Shelf:
    """One of each kind of file, made by the package itself on tiny models."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        datasets.config.HF_DATASETS_CACHE = scratch / "datasets"
        datasets.disable_progress_bars()
        self.trap = scratch / "sprung"
        with _quietly():
            self.kinds = self._make()

    def _make(self) -> dict[str, Kind]:
        folder = self.scratch / "whole"
        save_tiny(folder / "base")
        base = load_base(str(folder / "base"), "float32")
        prompts = [from_text(f"w{i} w{2 * i}", str(i)) for i in range(12)]
        adapter = new_adapter(base.model, tiny_config(draft_vocab_size=20), base.tokenizer, torch.arange(4, 24)).randomize(1)
        adapter.save_pretrained(folder / "adapter")
        kinds = {
            "base": Kind(folder / "base", _names(folder / "base"), lambda f: load_base(str(f), "float32")),
            "adapter": Kind(folder / "adapter", _names(folder / "adapter"), lambda f: self._read_adapter(base, f)),
        }
        (folder / "gguf").mkdir()
        save_gguf(folder / "gguf" / "base.gguf")
        kinds["GGUF"] = Kind(folder / "gguf", ["base.gguf"], lambda f: load_base(str(f), "float32"))
        for file in self._write_prompts(folder / "prompts"):
            kinds[f"prompts {file}"] = Kind(folder / "prompts", [file], lambda f, file=file: read_prompts(f / file))
        kinds |= self._answers(folder, base, prompts) | self._journals(folder, base, prompts, adapter)
        costs = CostCurve(0.01, (1, 2, 8), (0.011, 0.012, 0.02), 0.001, 0.0005, 64, 1e-6, 1e-7).to_dict()
        (folder / "costs").mkdir()
        (folder / "costs" / "curve.json").write_text(json.dumps({"curve": costs, "depends_on": {}}))
        kinds["cost curve"] = Kind(folder / "costs", ["curve.json"], lambda f: self._read_costs(f, adapter, base))
        kinds["verdict"] = self._verdict(folder / "verdict", accelerate(base.model, adapter))
        return kinds

    def _verdict(self, folder: Path, fast: AcceleratedModel) -> Kind:
        """One that was damaged is never believed: it could promise too much."""
        folder.mkdir()
        verdict.keep(folder / "verdict.json", fast.runner.model, fast.guarantee)

        def read(f: Path) -> Guarantee | None:
            with contextlib.suppress(*verdict.BROKEN):
                return verdict.read_guarantee(f / "verdict.json", fast.reader.model, fast.runner.model)
            return None

        def checks(found: Guarantee | None, file: str, f: Path, damaged: bytes) -> str | None:
            return None if found in (None, fast.guarantee) else f"a damaged verdict was believed: {found}"

        return Kind(folder, ["verdict.json"], read, checks)

    def _write_prompts(self, folder: Path) -> list[str]:
        folder.mkdir()
        records = [{"prompt": f"w{i} w{i + 1}", "category": "ab"[i % 2]} for i in range(20)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "p.jsonl").write_text(lines)
        (folder / "q.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (folder / "r.json").write_text(json.dumps(records))
        (folder / "t.txt").write_text("\n".join(record["prompt"] for record in records))
        table = datasets.Dataset.from_list(records)
        table.to_csv(folder / "c.csv")
        table.to_parquet(folder / "d.parquet")
        table.save_to_disk(folder / "disk")
        shutil.copy(next((folder / "disk").glob("*.arrow")), folder / "e.arrow")
        shutil.rmtree(folder / "disk")
        return _names(folder)

    def _answers(self, folder: Path, base: Base, prompts: list[Prompt]) -> dict[str, Kind]:
        """A folder that distill has filled, what train has made of it, and a shard that was being written."""
        config = DistillConfig(max_new_tokens=8, batch_size=6, answer_tokens=80, self_drawn=4)
        distill(base, prompts, config, folder / "answers")
        streaming, training = tiny_config(), TrainConfig(steps=2, answers_per_step=4, held_out=3, eval_every=1, checkpoint_every=1)
        train(base, [folder / "answers"], folder / "trained", streaming, training)
        checkpoint = _names(folder / "trained") + [f"checkpoint-000002/{name}" for name in _names(folder / "trained" / "checkpoint-000002")]
        done = Answers.read(folder / "answers")
        sizes, growing = [], folder / "growing"
        growing.mkdir()
        writer = AnswerWriter(growing, 0, {})
        for number in range(len(done)):
            writer.write(done[number])
            sizes.append((growing / "answers-000-00000.arrow").stat().st_size)
        torn = (growing / "answers-000-00000.arrow").read_bytes()
        writer.__exit__(None, None, None)
        (growing / "answers-000-00000.arrow").write_bytes(torn)  # as a kill would have left it

        def mended(f: Path) -> list[dict[str, Any]]:
            mend(f)
            found = Answers.read(f)
            return [found[number] for number in range(len(found))]

        def kept(found: list[dict[str, Any]], file: str, f: Path, damaged: bytes) -> str | None:
            """Of a shard that is cut short all that is whole stays."""
            least = sum(size <= len(damaged) for size in sizes)
            cut_short = torn.startswith(damaged)
            return f"{len(found)} of {least} whole answers are left" if cut_short and found[:least] != [done[i] for i in range(least)] else None

        return {
            "answers": Kind(folder / "answers", _names(folder / "answers"), lambda f: distill(base, prompts, replace(config, answer_tokens=120), f)),
            "answers to learn from": Kind(
                folder / "answers", _names(folder / "answers"), lambda f: train(base, [f], f / "out", streaming, replace(training, steps=1))
            ),
            "a growing shard": Kind(growing, _names(growing), mended, kept),
            "checkpoint": Kind(folder / "trained", checkpoint, lambda f: train(base, [folder / "answers"], f, streaming, training)),
        }

    def _journals(self, folder: Path, base: Base, prompts: list[Prompt], adapter: StreamAdapter) -> dict[str, Kind]:
        fast, decoding = accelerate(base.model, adapter, exact="near-tie"), Decoding(max_new_tokens=5)
        few = prompts[:3]
        (folder / "journals").mkdir()

        def measured(f: Path) -> Any:
            return bench(base, fast, "random", few, decoding, None, f / "bench.journal")

        def certified(f: Path) -> Any:
            return certify(base, fast, "random", asked(base, few, decoding), decoding, None, f / "verify.journal")

        measured(folder / "journals")
        certified(folder / "journals")
        return {
            "bench journal": Kind(folder / "journals", ["bench.journal"], measured),
            "verify journal": Kind(folder / "journals", ["verify.journal"], certified),
        }

    def _read_adapter(self, base: Base, folder: Path) -> None:
        """What can be read serves without a wrong token, whatever numbers are in it."""
        adapter = StreamAdapter.from_pretrained(folder, {"fingerprint": fingerprint(base.model, base.tokenizer)})
        fast = accelerate(base.model, adapter, exact="near-tie")
        ids = torch.tensor([[4, 5, 6, 7]])
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        if not torch.equal(fast.generate(ids, **asked), base.model.generate(ids, **asked)):
            raise AssertionError("an adapter of broken numbers has changed a token")

    def _read_costs(self, folder: Path, adapter: StreamAdapter, base: Base) -> None:
        """A broken curve is measured again, and whatever is read is a curve."""
        found = None
        with contextlib.suppress(*measure.BROKEN):
            found = measure.read_curve(folder / "curve.json")
        if found is not None:
            found.at(1000).draft_s(3)
            found.at(1000).verify_s(5)

    def try_case(self, seed: int, number: int) -> tuple[str, str | None]:
        """Case `number` of this seed: its outcome in a word, and what is wrong, if anything is."""
        rng = random.Random(f"{seed}/{number}/file")
        name = rng.choice(list(self.kinds))
        kind = self.kinds[name]
        file, damage = rng.choice(kind.files), rng.choice(_DAMAGES)
        folder = self.scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kind.whole, folder)
        trapped = rng.random() < 0.1
        damaged = pickle.dumps(Trap(self.trap)) if trapped else damage((folder / file).read_bytes(), rng)
        (folder / file).write_bytes(damaged)
        case = f"file {seed}/{number} ({name}: {file}, {'a pickle' if trapped else damage.__name__})"
        before = _bytes(folder)
        try:
            with _quietly():
                found = kind.read(folder)
        except UsageError as error:
            if "\n" in str(error).strip():
                return "failed", f"{case}: the message has several lines: {error}"
            if gone := sorted(name for name, data in before.items() if _bytes(folder).get(name) != data):
                return "failed", f"{case}: it was refused ({error}), and yet changed {', '.join(gone)}"
            outcome = "refused in a sentence"
        except Exception as error:
            return "failed", f"{case}: {type(error).__name__}: {error}"
        else:
            if wrong := kind.checks(found, file, folder, damaged):
                return "failed", f"{case}: {wrong}"
            outcome = "read"
        if self.trap.exists():
            self.trap.rmdir()
            return "failed", f"{case}: code in the file was run"
        return outcome, None


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def _quietly() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
