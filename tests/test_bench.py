"""The measurement: one clock, one counter, and a report that adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.base.loading import load_base
from lossless.distillation.prompts import from_text
from lossless.errors import UsageError
from lossless.evaluation import bench as module
from lossless.evaluation import machine
from lossless.evaluation import sides as side_module
from lossless.evaluation.bench import Run, SideRun, acceptance_by_depth, bench, run_sides, summarize
from lossless.evaluation.bench_plot import draw
from lossless.evaluation.machine import ceiling, weights_read
from lossless.evaluation.report import categories_table, sides_table
from lossless.evaluation.sides import Side, accelerated, stock
from lossless.evaluation.timing import Clock, Decoding, encode_checked, timed_generate
from lossless.generation.model import accelerate

from .conftest import tiny_config


@pytest.fixture
def pair(tiny_folder: Path):  # type: ignore[no-untyped-def]
    base = load_base(str(tiny_folder))
    return base, accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1))


def test_the_clock_ticks_once_a_token_on_both_sides(pair) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair
    ids = torch.tensor([[1, 5, 6, 1]])
    for model in (base.model, fast):
        tokens, clock = timed_generate(model, ids, Decoding(max_new_tokens=17))
        assert len(tokens) == len(clock.ticks) == 17
        assert clock.decode_s == clock.ticks[-1] - clock.ticks[0] > 0


def test_a_report_adds_up(pair) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair
    prompts = [from_text(f"w{i} w{i + 1}", f"p{i}") for i in range(4)]
    decoding = Decoding(max_new_tokens=9, do_sample=True, temperature=0.8, seed=3)
    found = bench(base, fast, "here", prompts, decoding)
    runs = [Run.from_dict(run, list(run["sides"])) for run in found["runs"]]
    assert {"model", "adapter", "dtype", "device", "threads", "versions", "prompts", "tokens", "identical",
            "acceptance_length", "baseline_tokens_per_s", "tokens_per_s", "speedup", "categories", "runs"} <= found.keys()  # fmt: skip
    assert found["dtype"] == "float32"
    assert (found["prompts"], found["tokens"], found["identical"]) == (4, 36, 4)
    passes = sum(r.target_passes for r in runs)
    assert found["acceptance_length"] == pytest.approx((36 - 4) / passes, abs=1e-3)
    for run in runs:
        assert run.speedup == pytest.approx(run.baseline_decode_s / run.decode_s)
        assert run.tokens_per_s == pytest.approx(8 / run.decode_s)
    assert "4/4" in categories_table(found)
    assert sum(found["acceptance_by_depth"]) + 1 == pytest.approx(32 / passes, abs=1e-3), "every depth that is reached is a token"
    assert found["speedup_quartiles"][0] <= found["speedup"] <= found["speedup_quartiles"][1]


def test_a_bench_beside_others_keeps_them_running_and_ends_them(pair, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair
    others, running, real = [], [], subprocess.Popen.__init__
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *given, **options: others.append(self) or real(self, *given, **options))
    own = module.run_sides
    monkeypatch.setattr(module, "run_sides", lambda *given: running.append([each.poll() for each in others]) or own(*given))
    found = bench(base, fast, "here", [from_text("w1 w2", "p")], Decoding(max_new_tokens=3), beside=2)
    assert running == [[None] * 2] * 2, "of the warm-up and of the prompt"
    assert len(others) == 2
    assert all(each.returncode is not None for each in others)
    assert (found["beside"], found["identical"]) == (2, 1)
    with pytest.raises(UsageError, match="beside must be at least 0, got -1"):
        bench(base, fast, "here", [from_text("w1 w2", "p")], Decoding(max_new_tokens=3), beside=-1)


def test_what_never_rests_ends_with_whoever_began_it() -> None:
    subprocess.run([sys.executable, "-S", "-c", machine._NEVER_RESTS, "1"], timeout=60, check=True)


def test_every_side_is_measured_alike_and_each_goes_first_in_turn(pair) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair

    def other(ids: torch.Tensor, decoding: Decoding) -> tuple[list[int], Clock]:
        tokens, clock = timed_generate(base.model, ids, decoding)
        return [*tokens[:5], tokens[5] + 1, *tokens[6:]], clock

    rival = Side("plain-bfloat16", other, "bfloat16", plain=True)
    prompts = [from_text(f"w{i} w{i + 1}", f"p{i}") for i in range(4)]
    found = bench(base, fast, "here", prompts, Decoding(max_new_tokens=9), rivals=[rival])
    orders = [list(run["sides"]) for run in found["runs"]]
    names = ["stock", "accelerated", "plain-bfloat16"]
    assert orders == [names, names[1:] + names[:1], names[2:] + names[:2], names]
    for run in found["runs"]:
        assert [run["sides"][name]["first_difference"] for name in names] == [None, None, 5]
        for side in run["sides"].values():
            assert side["tokens_per_s"] == pytest.approx(8 / side["decode_s"])
            assert side["time_to_first_token_s"] > 0
            assert side["speedup"] == pytest.approx(side["tokens_per_s"] / run["baseline_tokens_per_s"])
        assert (run["speedup"], run["tokens_per_s"]) == tuple(run["sides"]["accelerated"][key] for key in ("speedup", "tokens_per_s"))
    assert {name: side["identical"] for name, side in found["sides"].items()} == {"stock": 4, "accelerated": 4, "plain-bfloat16": 0}
    assert found["identical"] == 4, "the verdict is on the accelerated side"
    plain = {name: found["sides"][name]["tokens_per_s"] for name in ("stock", "plain-bfloat16")}
    assert found["best_plain"]["side"] == max(plain, key=lambda name: plain[name])
    shown = sides_table(found)
    assert "plain-bfloat16 *" in shown
    assert "0/4" in shown


def test_acceptance_by_depth_counts_the_passes_that_got_there() -> None:
    def run(accepted: dict[int, int]) -> Run:
        return Run("id", "", 3, 9, 1.0, 4, 9, 0, 0, 0, 2.0, 8.0, "", accepted=accepted)

    assert acceptance_by_depth([run({1: 2, 3: 1}), run({2: 1})]) == [0.5, 0.25]
    assert acceptance_by_depth([run({})]) == []


def test_spread_is_that_of_the_paired_ratios() -> None:
    def run(speedup: float) -> Run:
        return Run("id", "", 3, 9, 1.0, 4, 9, 0, 0, 0, 2.0, 8.0, "", True, None, 1.0, 8.0 / speedup, speedup)

    found = summarize([run(speedup) for speedup in (3.0, 1.0, 2.0, 5.0, 4.0)])
    assert (found["speedup"], found["speedup_quartiles"]) == (3.0, [2.0, 4.0])
    assert summarize([run(2.0)])["speedup_quartiles"] == [2.0, 2.0]


def test_the_machine_allows_so_many_tokens_as_it_reads_weights(pair) -> None:  # type: ignore[no-untyped-def]
    base, _ = pair
    weights, numbers = weights_read(base.model)
    inputs, outputs = base.model.get_input_embeddings().weight, base.model.get_output_embeddings().weight
    assert outputs is not inputs
    assert numbers == sum(p.numel() for p in base.model.parameters()) - inputs.numel(), "a pass reads one row of them"
    assert weights == 4 * numbers
    found = ceiling(base)
    assert found["one_row_tokens_per_s"]["as loaded"] == found["one_row_tokens_per_s"]["float32"]
    assert found["one_row_tokens_per_s"]["bfloat16"] == pytest.approx(2 * found["one_row_tokens_per_s"]["float32"], rel=1e-3)
    assert found["one_row_tokens_per_s"]["float32"] * weights == pytest.approx(found["bandwidth_gb_s"] * 1e9, rel=0.1)


@pytest.mark.parametrize("plain", [True, False])
def test_a_report_can_be_drawn_with_and_without_what_compares(pair, tmp_path: Path, plain: bool) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair
    found = bench(base, fast, "here", [from_text("w1"), from_text("w2")], Decoding(max_new_tokens=5), plain=plain)
    draw(found, tmp_path / "bare.png")
    draw(found | {"machine": ceiling(base), "suite": "gsm8k"}, tmp_path / "whole.png")
    assert (tmp_path / "bare.png").read_bytes() != (tmp_path / "whole.png").read_bytes()


def test_acceptance_alone_is_that_of_a_comparison(pair) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair
    prompts, decoding = [from_text(f"w{i} w{i + 1}", f"p{i}") for i in range(3)], Decoding(max_new_tokens=9)
    compared, alone = (bench(base, fast, "here", prompts, decoding, plain=plain) for plain in (True, False))
    for what in ("prompts", "tokens", "acceptance_length", "reread", "speculated"):
        assert alone[what] == compared[what]
    assert [run["answer"] for run in alone["runs"]] == [run["answer"] for run in compared["runs"]]
    for missing in ("identical", "baseline_tokens_per_s", "speedup"):
        assert alone[missing] is None
        assert alone["runs"][0][missing] is None
    assert categories_table(alone).splitlines()[-1].split()[3] == "-"


def test_an_interrupted_bench_goes_on_after_the_runs_that_it_has(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:
    base, fast = pair
    prompts, decoding = [from_text(f"w{i} w{i + 1}", f"p{i}") for i in range(4)], Decoding(max_new_tokens=9)
    journal, real, done = tmp_path / "journal", module.run_sides, []

    def third_time_unlucky(base, fast, prompt, *rest, **how):  # type: ignore[no-untyped-def]
        if len(done) == 3:  # the warm-up is the first
            raise KeyboardInterrupt
        done.append(prompt.id)
        return real(base, fast, prompt, *rest, **how)

    monkeypatch.setattr(module, "run_sides", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        bench(base, fast, "here", prompts, decoding, journal=journal)
    monkeypatch.setattr(module, "run_sides", real)
    with pytest.raises(UsageError, match=r"begun with other settings .prompt_ids."):
        bench(base, fast, "here", prompts[1:], decoding, journal=journal)
    first = journal.read_text().splitlines()
    found = bench(base, fast, "here", prompts, decoding, journal=journal)
    assert [run["id"] for run in found["runs"]] == ["p0", "p1", "p2", "p3"]
    assert journal.read_text().splitlines()[:3] == first
    assert len(first) == 3, "whose it is, and two runs"
    assert found["tokens"] == 36


def test_a_difference_is_seen_and_placed(pair, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    base, fast = pair
    real = side_module.timed_generate

    def tampered(model, ids, decoding):  # type: ignore[no-untyped-def]
        tokens, clock = real(model, ids, decoding)
        if model is fast:
            tokens[4] += 1
        return tokens, clock

    monkeypatch.setattr(side_module, "timed_generate", tampered)
    both = [accelerated(base, fast), stock(base)]
    run = run_sides(base, fast, from_text("w1"), torch.tensor([[1, 4, 1]]), Decoding(max_new_tokens=8), both)
    assert not run.identical
    assert run.first_difference == 4
    assert summarize([run])["identical"] == 0


def test_prompts_beyond_the_context_are_refused_before_any_work(pair) -> None:  # type: ignore[no-untyped-def]
    base, _ = pair
    long = from_text(" ".join(["w1"] * 505), "long one")
    with pytest.raises(UsageError, match=r"'long one' has 507 tokens.*context of 512"):
        encode_checked(base, [from_text("w1"), long], Decoding(max_new_tokens=8))
    assert encode_checked(base, [long], Decoding(max_new_tokens=5))[0].shape == (1, 507)


@pytest.mark.parametrize(("change", "rule"), [({"temperature": 0.0}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 0}, "max_new")])
def test_decoding_rules(change: dict[str, float], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Decoding(**change)  # type: ignore[arg-type]


def test_a_clock_stops_nothing() -> None:
    assert not Clock(2)(torch.zeros(2, 3), None).any()


def test_a_clock_gives_tokens_that_come_together_one_time() -> None:
    clock = Clock(4)
    for length in (6, 7, 10):
        clock(torch.zeros(1, length), None)
    first, later = clock.ticks[0], clock.ticks[-1]
    assert [clock.ticks.count(first), clock.ticks.count(later), len(clock.ticks)] == [2, 3, 6]
    assert clock.time_to_first_token_s == first - clock.began
    assert clock.tokens_per_s == pytest.approx(4 / (later - first)), "those that came first took no decoding"


def test_runs_survive_json() -> None:
    run = Run("id", "", 3, 9, 1.0, 4, 9, 0, 0, 0, 2.0, 8.0, "", accepted={1: 2, 4: 1}, sides={"stock": SideRun(9, 0.1, 1.0, 8.0)})
    assert Run.from_dict(json.loads(json.dumps(asdict(run))), list(run.sides)) == run
