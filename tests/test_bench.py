"""The measurement: one clock, one counter, and a report that adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lossless import bench as module
from lossless.bench import Clock, Decoding, Run, bench, encode_checked, run_pair, summarize, table, timed_generate
from lossless.errors import UsageError
from lossless.fit import new_adapter
from lossless.generate import accelerate
from lossless.models import load_base
from lossless.prompts import from_text

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
    runs = [Run(**run) for run in found["runs"]]
    assert {"model", "adapter", "dtype", "device", "threads", "versions", "prompts", "tokens", "identical",
            "acceptance_length", "baseline_tokens_per_s", "tokens_per_s", "speedup", "categories", "runs"} <= found.keys()  # fmt: skip
    assert found["dtype"] == "float32"
    assert (found["prompts"], found["tokens"], found["identical"]) == (4, 36, 4)
    passes = sum(r.target_passes for r in runs)
    assert found["acceptance_length"] == pytest.approx((36 - 4) / passes, abs=1e-3)
    for run in runs:
        assert run.speedup == pytest.approx(run.baseline_decode_s / run.decode_s)
        assert run.tokens_per_s == pytest.approx(8 / run.decode_s)
    assert "4/4" in table(found)


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
    assert table(alone).splitlines()[-1].split()[3] == "-"


def test_an_interrupted_bench_goes_on_after_the_runs_that_it_has(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:
    base, fast = pair
    prompts, decoding = [from_text(f"w{i} w{i + 1}", f"p{i}") for i in range(4)], Decoding(max_new_tokens=9)
    journal, real, done = tmp_path / "journal", module.run_pair, []

    def third_time_unlucky(base, fast, prompt, *rest, **how):  # type: ignore[no-untyped-def]
        if len(done) == 3:  # the warm-up is the first
            raise KeyboardInterrupt
        done.append(prompt.id)
        return real(base, fast, prompt, *rest, **how)

    monkeypatch.setattr(module, "run_pair", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        bench(base, fast, "here", prompts, decoding, journal=journal)
    monkeypatch.setattr(module, "run_pair", real)
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
    real = module.timed_generate

    def tampered(model, ids, decoding):  # type: ignore[no-untyped-def]
        tokens, clock = real(model, ids, decoding)
        if model is fast:
            tokens[4] += 1
        return tokens, clock

    monkeypatch.setattr(module, "timed_generate", tampered)
    run = run_pair(base, fast, from_text("w1"), torch.tensor([[1, 4, 1]]), Decoding(max_new_tokens=8), fast_first=True)
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
    assert not Clock()(torch.zeros(2, 3), None).any()
