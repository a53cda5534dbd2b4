"""What the README tells people to type is what works."""

from __future__ import annotations

import functools
import json
import re
import shlex
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lossless.ablation import VARIANTS, table
from lossless.adapter import StreamAdapter
from lossless.cli import _parser, main
from lossless.commands import shipped_adapter
from lossless.models import Base

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `lossless ...` in the README's shell blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words and Path(words[0]).name == "lossless":
                    found.append(words[1:])
    return found


def test_every_command_parses() -> None:
    assert {words[0] for words in commands()} == {"generate", "compare", "bench", "verify", "forecast", "doctor", "distill", "train", "ablate", "push"}
    for words in commands():
        _parser().parse_args(words)


def test_the_main_command_answers_and_is_identical(demo: Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = next(words for words in commands() if words[0] == "compare")
    assert main([*words, "--max-new-tokens", "24"]) == 0
    assert "identical: all 24 tokens" in capsys.readouterr().out


def older(found: dict[str, Any]) -> str:
    """A mark for what was measured with an adapter that was shipped before."""
    return "" if found["adapter"] != "shipped" or found.get("weights") == shipped_weights() else " †"


@functools.cache
def shipped_weights() -> str:
    folder = shipped_adapter("demo")
    assert folder is not None
    return StreamAdapter.from_pretrained(folder).digest()


SUITES = {"mt_bench": "MT-bench", "spec_bench": "Spec-Bench", "long_answers": "long answers", "long_prompts": "long prompts"}


def setting(found: dict[str, Any]) -> str:
    """What was accelerated: dtype, packed or not, and with which adapter."""
    packed = ", packed" if found["packed"] else ""
    return ("NF4" if found["load_in"] == "4bit" else found["dtype"]) + packed + (", random adapter" if found["adapter"] == "random" else "")


def decoded(found: dict[str, Any]) -> str:
    decoding = found["decoding"]
    return f"sampled at {decoding['temperature']}" if decoding["do_sample"] else "greedy"


def middle(quartiles: list[float]) -> str:
    return f"({quartiles[0]:.2f} to {quartiles[1]:.2f})"


def speed_row(found: dict[str, Any]) -> str:
    """The README's table row of a stored measurement against stock `generate`."""
    slowest = min(run["speedup"] for run in found["runs"])
    return (
        f"| {SUITES[found['suite']]}, {found['decoding']['max_new_tokens']} tokens | {setting(found)} | {decoded(found)} | {found['machine']['cpu_capability']} "
        f"| {found['identical']} of {found['prompts']} | {found['baseline_tokens_per_s']:.1f} | {found['tokens_per_s']:.1f} "
        f"| **{found['speedup']:.2f}** {middle(found['speedup_quartiles'])} | {slowest:.2f} | {found['acceptance_length']:.2f} |"
    )


def rival_rows(found: dict[str, Any]) -> list[str]:
    """One row for each way to answer of a stored comparison."""
    return [
        f"| {found['machine']['cpu_capability']} | {name} | {side['identical']} of {found['prompts']} | {1000 * side['time_to_first_token_s']:.0f} ms "
        f"| {side['tokens_per_s']:.1f} | {side['speedup']:.2f} {middle(side['speedup_quartiles'])} |"
        for name, side in sorted(found["sides"].items(), key=lambda item: -item[1]["tokens_per_s"])
    ]


def task_rows(found: dict[str, Any]) -> list[str]:
    """One row for each task of Spec-Bench, against prompt lookup."""
    parts = defaultdict(list)
    for run in found["runs"]:
        parts[TASKS.get(run["category"], "multi-turn conversation")].append(run)
    rows = []
    for task, runs in parts.items():
        ours, theirs = (statistics.median(run["sides"][name]["speedup"] for run in runs) for name in ("accelerated", "prompt-lookup"))
        length = sum(run["tokens"] - 1 for run in runs) / sum(run["target_passes"] for run in runs)
        rows.append(f"| {task} | {len(runs)} | {sum(run['identical'] for run in runs)} | **{ours:.2f}** | {theirs:.2f} | {length:.2f} |")
    return rows


def table_of(marker: str) -> list[str]:
    """The rows of a table of the README, between its marks."""
    _, _, rest = README.partition(f"<!-- {marker} -->")
    return [line for line in rest.partition(f"<!-- end of {marker} -->")[0].splitlines() if line.startswith("|")][2:]


def speed_reports() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "data" / "reports").glob("speed-*.json"))}


def test_every_speed_comes_from_a_stored_report() -> None:
    reports = speed_reports()
    assert sorted(table_of("speed")) == sorted(map(speed_row, reports.values()))
    compared = [found for found in reports.values() if "packed-float32" in found["sides"]]
    assert sorted(table_of("rivals")) == sorted(row for found in compared for row in rival_rows(found))
    assert sorted(table_of("tasks")) == sorted(row for found in reports.values() if found["suite"] == "spec_bench" for row in task_rows(found))
    first = reports["speed-mt_bench-float32"]
    assert f"MT-bench {first['speedup']:.2f} times as fast" in README
    assert f"{first['identical']} of {first['prompts']} answers identical." in README
    for found in reports.values():
        assert f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}" in README


def test_the_certificate_is_the_stored_one() -> None:
    found = json.loads((ROOT / "data" / "reports" / "certificate-mt_bench-float32.json").read_text(encoding="utf-8"))
    assert found["mismatches"] == 0
    assert (
        f"{found['identical_prompts']} of {found['prompts']} answers identical, {found['mismatches']} mismatches and {found['near_ties']} "
        f"near-ties in {found['tokens']:,} tokens" in " ".join(README.split())
    )


def certificate_row(found: dict[str, Any]) -> str:
    """The README's table row of a stored certificate."""
    flips = 1000 * (found["near_ties"] + found["mismatches"]) / found["tokens"]
    return (
        f"| {'NF4' if found['load_in'] == '4bit' else found['dtype']}{older(found)} | {found['guarantee']['exact']} | {flips:.1f} "
        f"| {found['mismatches']} | {found['identical_prompts']} of {found['prompts']} "
        f"| {found['same_bits']} of {found['tokens']} | {found['speedup']:.2f} |"
    )


def benchmark_row(found: dict[str, Any]) -> str:
    """The README's table row of a certificate over public benchmarks."""
    decoding = found["decoding"]
    return (
        f"| {'NF4' if found['load_in'] == '4bit' else found['dtype']}{older(found)} | {found['guarantee']['exact']} "
        f"| {'sampled at ' + str(decoding['temperature']) if decoding['do_sample'] else 'greedy'} "
        f"| {found['identical_prompts']} of {found['prompts']} | {found['mismatches']} | {found['near_ties']} "
        f"| {found['same_bits']:,} of {found['tokens']:,} |"
    )


# of Spec-Bench; MT-bench's own eight categories are its conversations
TASKS = {"translation": "translation", "summarization": "summarization", "qa": "question answering",
         "math_reasoning": "mathematical reasoning", "rag": "retrieval-augmented generation"}  # fmt: skip
SETS = {
    "mt_bench": "MT-bench, first turns",
    "mt_bench_24": "MT-bench, 3 of each category",
    "spec_bench": "Spec-Bench",
    "HumanEval": "HumanEval",
    "gsm8k_test": "GSM8K",
    "mt_bench_ja": "MT-bench in Japanese",
    "mt_bench_zh": "MT-bench in Chinese",
}


# what drafts, by the adapter's name
DRAFTERS = {
    "shipped": "streams",
    "runs/paper": "the paper's streams",
    "runs/ablation/paper-+-pruning-layer": "the paper's streams on a small budget",
    "runs/ablation/paper-+-transition": "streams with a transition on a small budget",
}


def acceptance_rows() -> list[str]:
    """The README's table rows of how many tokens a pass public benchmarks give, `accept-<set>-<how>.json`."""
    rows = []
    for path in sorted(Path(shipped_adapter("demo") or "").glob("accept-*.json")):
        found, parts = json.loads(path.read_text(encoding="utf-8")), defaultdict(list)
        name = path.stem.split("-")[1]
        for run in found["runs"]:
            task = f"{SETS[name]}, {TASKS.get(run['category'], 'multi-turn conversation')}" if name == "spec_bench" else SETS[name]
            parts[task].append(run)
        decoding = found["decoding"]
        how = f"sampled at {decoding['temperature']}" if decoding["do_sample"] else "greedy"
        streams = DRAFTERS[found["adapter"]] + (" and recall" if found["recall"] else " alone")
        for task, runs in parts.items():
            length = sum(run["tokens"] - 1 for run in runs) / sum(run["target_passes"] for run in runs)
            tokens = sum(run["tokens"] for run in runs)
            rows.append(f"| {task} | {found['dtype']} | {how} | {streams}{older(found)} | {len(runs)} | {tokens:,} | {length:.2f} |")
    return rows


def test_every_acceptance_length_comes_from_a_stored_report() -> None:
    _, _, rest = README.partition("<!-- acceptance -->")
    rows = [line for line in rest.partition("<!-- end of acceptance -->")[0].splitlines() if line.startswith("|")][2:]
    assert rows
    assert sorted(rows) == sorted(acceptance_rows())


def pruning_row(found: dict[str, Any]) -> str:
    """The README's table row of what the pruning layer keeps at one floor."""
    passes = sum(run["target_passes"] for run in found["runs"])
    return (
        f"| {found['pruning_floor']:g} | {found['speculated'] / passes:.1f} | {100 * found['pruned_wrongly'] / passes:.1f} "
        f"| {found['acceptance_length']:.2f} |"
    )


def test_what_pruning_does_comes_from_stored_reports() -> None:
    _, _, rest = README.partition("<!-- pruning -->")
    rows = [line for line in rest.partition("<!-- end of pruning -->")[0].splitlines() if line.startswith("|")][2:]
    assert rows
    assert rows == list(map(pruning_row, sorted(stored("pruning"), key=lambda found: float(found["pruning_floor"]))))
    [training] = stored("paper")
    assert f"foretold {training['acceptance_length']:.2f} (`paper-training.json`)" in README


def stored(kind: str) -> list[dict[str, Any]]:
    paths = sorted(Path(shipped_adapter("demo") or "").glob(f"{kind}-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_every_number_comes_from_a_stored_report() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| (float|bfloat|NF4)", line)]
    assert rows
    written = [*map(certificate_row, stored("verify")), *map(benchmark_row, stored("benchmarks"))]
    assert sorted(rows) == sorted(written)


def test_the_ablations_are_the_stored_ones_and_leave_no_variant_out() -> None:
    reports = stored("ablation")
    assert {row["name"] for report in reports for row in report["variants"]} == {variant.name for variant in VARIANTS}
    for report in reports:
        assert table(report) in README


def test_the_shipped_adapter_is_small_and_there() -> None:
    folder = shipped_adapter("demo")
    assert folder is not None
    assert sum(f.stat().st_size for f in Path(folder).iterdir()) <= 16 * 2**20
    assert shipped_adapter("some/other") is None


@pytest.mark.parametrize("options", [[], ["--do-sample", "--temperature", "0.8", "--seed", "3"]], ids=["greedy", "sampled"])
def test_the_demo_model_is_lossless_in_float32(demo: Base, options: list[str], tmp_path: Path) -> None:
    arguments = ["bench", "--model", "demo", "--dtype", "float32", "--prompts", str(ROOT / "data" / "prompts.jsonl")]
    assert main([*arguments, "--limit", "3", "--max-new-tokens", "32", *options]) == 0
