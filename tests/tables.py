"""The tables and figures of every README, made of the reports in data/reports: `python -m tests.tables` writes them.

Knows: which report becomes which row, and where it stands. Does not know: how anything is measured. What a mark
`<!-- name -->` ... `<!-- end of name -->` encloses is written here, and nothing else; the tests hold it to the reports.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lossless.adapter.hub import shipped_adapter
from lossless.adapter.weights import StreamAdapter
from lossless.training.ablation import table

from . import versions
from .chat import measure

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "data" / "reports"
Report = dict[str, Any]

SUITES = {"mt_bench": "MT-bench", "spec_bench": "Spec-Bench", "humaneval": "HumanEval", "gsm8k": "GSM8K",
          "long_answers": "long answers", "long_prompts": "long prompts"}  # fmt: skip
# of Spec-Bench; MT-bench's own eight categories are its conversations
TASKS = {"translation": "translation", "summarization": "summarization", "qa": "question answering",
         "math_reasoning": "mathematical reasoning", "rag": "retrieval-augmented generation"}  # fmt: skip
SETS = {"mt_bench": "MT-bench, first turns", "mt_bench_24": "MT-bench, 3 of each category", "spec_bench": "Spec-Bench",
        "HumanEval": "HumanEval", "gsm8k_test": "GSM8K", "mt_bench_ja": "MT-bench in Japanese", "mt_bench_zh": "MT-bench in Chinese"}  # fmt: skip
# what drafts, by the adapter's name
DRAFTERS = {"shipped": "streams", "runs/paper": "the paper's streams",
            "runs/ablation/paper-+-pruning-layer": "the paper's streams on a small budget",
            "runs/ablation/paper-+-transition": "streams with a transition on a small budget"}  # fmt: skip
# the rows of the first page, in its order
FRONT = ("float32-rivals", "float32-beside", "float32-sampled", "float32-random", "float32-checkpoint", "bfloat16", "bfloat16-packed", "float16", "4bit", "4bit-bfloat16",
         "float16-nogcc", "float32-amx", "bfloat16-amx", "bfloat16-packed-amx", "float32-avx2", "bfloat16-avx2")  # fmt: skip


def reports(kind: str) -> dict[str, Report]:
    """The stored reports `<kind>-*.json`, by the rest of their names."""
    return {path.stem.removeprefix(f"{kind}-"): json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPORTS.glob(f"{kind}-*.json"))}


@functools.cache
def shipped_weights() -> str:
    folder = shipped_adapter("demo")
    assert folder is not None
    return StreamAdapter.from_pretrained(folder).digest()


def older(found: Report) -> str:
    """A mark for what was measured with an adapter that was shipped before."""
    return "" if found["adapter"] != "shipped" or found.get("weights") == shipped_weights() else " †"


def in_table(head: str, rows: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *rows])


def precision(found: Report) -> str:
    """Of the weights; what is not in NF4 beside such is in float32 unless it says otherwise."""
    return str(found["dtype"]) if found["load_in"] != "4bit" else "NF4" if found["dtype"] == "float32" else f"NF4, {found['dtype']}"


def setting(found: Report) -> str:
    """What was accelerated: dtype, packed or not, and with which adapter; a model in a folder is told by its name."""
    model = "" if found["model"] == "demo" else f" {Path(found['model']).name.replace('-', ' ')}"
    beside = f", beside {found['beside']} busy programs" if found.get("beside") else ""
    return precision(found) + model + (", packed" if found["packed"] else "") + (", random adapter" if found["adapter"] == "random" else "") + beside


def decoded(found: Report) -> str:
    decoding = found["decoding"]
    return f"sampled at {decoding['temperature']}" if decoding["do_sample"] else "greedy"


def processor(found: Report) -> str:
    """As torch calls it, but for those that multiply tiles; those with AVX-512 have bfloat16 arithmetic and kernels of ours, unless they say that they
    have not."""
    name, pairs = str(found["machine"]["cpu_capability"]), found["machine"].get("pairs_of_bfloat16", True)
    if pairs and "amx_bf16" in found["machine"]["processor_flags"]:
        return "AMX"
    if pairs is None:
        return f"{name}, no gcc"
    return name if name == "AVX2" or pairs else f"{name} without bfloat16"


def middle(quartiles: list[float]) -> str:
    return f"({quartiles[0]:.2f} to {quartiles[1]:.2f})"


def slowest(found: Report) -> float:
    return float(min(run["speedup"] for run in found["runs"]))


def asked(found: Report) -> str:
    return f"{SUITES[found['suite']]}, {found['decoding']['max_new_tokens']} tokens"


def speed() -> str:
    """Every measurement against stock `generate`."""
    head = "| prompts | model | decoding | processor | identical | stock tokens/s | accelerated tokens/s | speedup | slowest prompt | tokens per pass |"
    rows = [
        f"| {asked(found)} | {setting(found)} | {decoded(found)} | {processor(found)} {against_stock(found)} {found['acceptance_length']:.2f} |"
        for found in reports("speed").values()
    ]
    return in_table(head, rows)


def against_stock(found: Report) -> str:
    """The cells of a row that say how both sides did."""
    return (
        f"| {found['identical']} of {found['prompts']} | {found['baseline_tokens_per_s']:.1f} | {found['tokens_per_s']:.1f} "
        f"| **{found['speedup']:.2f}** {middle(found['speedup_quartiles'])} | {slowest(found):.2f} |"
    )


def front() -> str:
    """Some of them, for the first page."""
    stored = reports("speed")
    found = [stored[f"mt_bench-{name}"] for name in FRONT]
    rows = [f"| {setting(one)} | {decoded(one)} | {processor(one)} {against_stock(one)}" for one in found]
    return in_table("| weights | decoding | processor | identical | plain tokens/s | accelerated | speedup (quartiles) | slowest prompt |", rows)


def gpu() -> str:
    """What was measured on a GPU, and what is best there without us, where that was."""
    head = (
        "| GPU | weights | decoding | identical | stock tokens/s | accelerated | speedup (quartiles) | slowest prompt | tokens per pass "
        "| best plain tokens/s | times that (quartiles) |"
    )
    rows = []
    for found in reports("gpu").values():
        best, without_us = found["best_plain"], "not measured | |"
        if best["side"] != "stock":
            without_us = f"{best['tokens_per_s']:.1f}, {best['side']} | **{best['speedup']:.2f}** {middle(best['speedup_quartiles'])} |"
        rows.append(
            f"| {found['device']} | {setting(found)} | {decoded(found)} {against_stock(found)} {found['acceptance_length']:.2f} | {without_us}"
        )
    return in_table(head, rows)


def compared() -> list[Report]:
    """Reports that have ways to answer beside stock and ours."""
    return [found for name, found in reports("speed").items() if len(found["sides"]) > 2 and not name.startswith("spec_bench")]


def fastest_first(found: Report) -> list[tuple[str, Report]]:
    return sorted(found["sides"].items(), key=lambda item: -item[1]["tokens_per_s"])


def best_without_us() -> str:
    """What else is to be had on the same machine, over the same prompts."""
    sentences = []
    for found in compared():
        if found["dtype"] == "float32":
            others = ", ".join(
                f"`{name}` {side['tokens_per_s']:.1f} ({side['identical']} of {found['prompts']})"
                for name, side in fastest_first(found) if name not in ("accelerated", "stock")
            )  # fmt: skip
            sentences.append(f"- {processor(found)}: **accelerated float32 {found['sides']['accelerated']['tokens_per_s']:.1f}**; {others}.")
    return "\n".join(sentences)


def rivals() -> str:
    """One row for each way to answer of each comparison."""
    rows = [
        f"| {processor(found)} | {setting(found)} | {name} | {side['identical']} of {found['prompts']} | {1000 * side['time_to_first_token_s']:.0f} ms "
        f"| {side['tokens_per_s']:.1f} | {side['speedup']:.2f} {middle(side['speedup_quartiles'])} |"
        for found in compared() for name, side in fastest_first(found)
    ]  # fmt: skip
    return in_table("| processor | stock | way to answer | answers that are stock's | time to first token | tokens/s | against stock |", rows)


def tasks() -> str:
    """One row for each task of Spec-Bench, against prompt lookup."""
    parts = defaultdict(list)
    for run in reports("speed")["spec_bench-float32"]["runs"]:
        parts[TASKS.get(run["category"], "multi-turn conversation")].append(run)
    rows = []
    for task, runs in parts.items():
        ours, theirs = (statistics.median(run["sides"][name]["speedup"] for run in runs) for name in ("accelerated", "prompt-lookup"))
        length = sum(run["tokens"] - 1 for run in runs) / sum(run["target_passes"] for run in runs)
        rows.append(f"| {task} | {len(runs)} | {sum(run['identical'] for run in runs)} | **{ours:.2f}** | {theirs:.2f} | {length:.2f} |")
    return in_table("| task | prompts | identical | accelerated | prompt lookup | tokens per pass |", rows)


def memory() -> str:
    """What both sides take."""
    rows = []
    for found in reports("memory").values():
        for side, taken in found["sides"].items():
            numbers = " | ".join(f"{taken[name]:,.0f}" for name in ("loaded", "peak", "early", "late", "twin"))
            rows.append(f"| {found['precision']}{', packed' if found['packed'] else ''} | {side} | {numbers} |")
        rows.append(
            f"| | accelerated / plain | | {found['peak_ratio']:.2f}, without the twin {found['peak_ratio_without_twin']:.2f} | | | |"
        )
    return in_table("| weights | MiB resident | loaded | peak | after a tenth of the answers | after all | of these a twin |", rows)


def levels() -> str:
    """What each level of exactness costs and spares."""
    rows = [
        f"| {precision(found)}{older(found)} | {found['guarantee']['exact']} | {1000 * (found['near_ties'] + found['mismatches']) / found['tokens']:.1f} "
        f"| {found['mismatches']} | {found['identical_prompts']} of {found['prompts']} | {found['same_bits']} of {found['tokens']} | {found['speedup']:.2f} |"
        for found in reports("verify").values()
    ]
    return in_table("| dtype | exact | flips per 1,000 | mismatches | identical answers | same bits | speed |", rows)


def certificates() -> str:
    """Certificates over public benchmarks."""
    rows = [
        f"| {precision(found)}{', packed' if found.get('packed') else ''}{older(found)} | {found['guarantee']['exact']} | {decoded(found)} | {found['device']} "
        f"| {found['identical_prompts']} of {found['prompts']} | {found['mismatches']} | {found['near_ties']} | {found['same_bits']:,} of {found['tokens']:,} |"
        for found in (*reports("benchmarks").values(), *reports("certificate").values())
    ]
    return in_table("| dtype | exact | decoding | device | identical answers | mismatches | near-ties | same bits |", rows)


def certified() -> str:
    """All of them, in a sentence."""
    found = [*reports("benchmarks").values(), *reports("certificate").values()]
    answers, same, tokens, wrong = (sum(one[name] for one in found) for name in ("prompts", "identical_prompts", "tokens", "mismatches"))
    return f"{same:,} of {answers:,} answers identical, {wrong} mismatches in {tokens:,} tokens, in {len(found)} settings of dtype, packing and sampling."


def acceptance() -> str:
    """How many tokens a pass public benchmarks give."""
    rows = []
    for name, found in reports("accept").items():
        suite, parts = name.split("-")[0], defaultdict(list)
        for run in found["runs"]:
            task = f", {TASKS.get(run['category'], 'multi-turn conversation')}" if suite == "spec_bench" else ""
            parts[SETS[suite] + task].append(run)
        streams = DRAFTERS[found["adapter"]] + (" and recall" if found["recall"] else " alone")
        for task, runs in parts.items():
            length = sum(run["tokens"] - 1 for run in runs) / sum(run["target_passes"] for run in runs)
            tokens = sum(run["tokens"] for run in runs)
            rows.append(f"| {task} | {found['dtype']} | {decoded(found)} | {streams}{older(found)} | {len(runs)} | {tokens:,} | {length:.2f} |")
    return in_table("| benchmark | dtype | decoding | drafts from | prompts | tokens | acceptance length |", rows)


def pruning() -> str:
    """What the pruning layer keeps at each floor."""
    rows = []
    for found in sorted(reports("pruning").values(), key=lambda found: float(found["pruning_floor"])):
        passes = sum(run["target_passes"] for run in found["runs"])
        rows.append(
            f"| {found['pruning_floor']:g} | {found['speculated'] / passes:.1f} | {100 * found['pruned_wrongly'] / passes:.1f} | {found['acceptance_length']:.2f} |"
        )
    return in_table("| floor | nodes that speculate, a pass | of 100 passes, pruned wrongly | acceptance length |", rows)


def ablation(dtype: str) -> Callable[[], str]:
    return lambda: table(reports("ablation")[dtype])


def chat_figures() -> str:
    return measure.table(reports("chat")["demo"])


def versions_tried() -> str:
    return versions.table(reports("versions")["tried"])


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"front": front, "best without us": best_without_us, "certified": certified},
    "lossless/evaluation/README.md": {
        "speed": speed, "rivals": rivals, "tasks": tasks, "memory": memory, "levels": levels, "certificates": certificates,
    },
    "lossless/adapters/demo/README.md": {
        "acceptance": acceptance, "ablation": ablation("bfloat16"), "second ablation": ablation("float32"), "pruning": pruning,
    },
    "lossless/README.md": {"gpu": gpu},
    "chat_app/README.md": {"measured": chat_figures},
    ".github/CONTRIBUTING.md": {"versions": versions_tried},
}  # fmt: skip


def between(text: str, name: str) -> str:
    """What stands between the marks."""
    _, begun, rest = text.partition(f"<!-- {name} -->\n")
    inside, ended, _ = rest.partition(f"<!-- end of {name} -->")
    if not begun or not ended:
        raise ValueError(f"there is no {name!r} between marks")
    return inside.strip("\n")


def write() -> None:
    """All of them, anew."""
    for path, tables in TABLES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, make in tables.items():
            between(text, name)
            before, _, rest = text.partition(f"<!-- {name} -->\n")
            text = f"{before}<!-- {name} -->\n{make()}\n<!-- end of {name} -->{rest.partition(f'<!-- end of {name} -->')[2]}"
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
