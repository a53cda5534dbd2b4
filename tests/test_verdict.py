"""The probe's verdict covers every pass, is kept by what it depends on, and its bound is held against what is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.errors import UsageError
from lossless.generation import attach as module
from lossless.generation import exactness, verdict
from lossless.generation.exactness import Guarantee, Passes
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.streams.runner import StreamRunner

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_lossless import both


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Guarantee]:
    """What probes find, with an empty cache."""
    found: list[Guarantee] = []
    real = module.find_guarantee
    monkeypatch.setattr(verdict, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(module, "find_guarantee", lambda *given: found.append(real(*given)) or found[-1])
    return found


def attached(seed: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> AcceleratedModel:
    model = build_tiny(seed=seed, hidden=64, inner=160).to(dtype)
    return accelerate(model, new_adapter(model, tiny_config()).randomize(2), **options)


@pytest.mark.parametrize("exact", ["bitwise", "near-tie", "off"])
def test_a_base_is_probed_once(exact: str, probed: list[Guarantee]) -> None:
    first, again = attached(exact=exact), attached(exact=exact)
    assert len(probed) == 1
    assert again.guarantee.describe() == first.guarantee.describe()
    names = {module: name for name, module in first.reader.model.named_modules()}
    others = {module: name for name, module in again.reader.model.named_modules()}
    for ours, theirs in [(first.guarantee.limits or {}, again.guarantee.limits or {})]:
        assert {names[module]: rows for module, rows in ours.items()} == {others[module]: rows for module, rows in theirs.items()}
    expected, found = both(again, prompt_ids())
    assert torch.equal(expected, found)
    assert again.stats.exact == exact


def test_another_base_or_wish_is_probed_by_itself(probed: list[Guarantee]) -> None:
    attached()
    attached(seed=6)
    attached(dtype=torch.bfloat16)
    attached(exact="near-tie")
    attached(schedule="deferred")
    assert len(probed) == 5
    fast = attached()
    assert len(probed) == 5
    fast.base.model.layers[1].self_attn.q_proj.weight.mul_(1.1)  # other weights
    both(fast, prompt_ids())
    assert len(probed) == 6
    fast.base.model.layers[1].register_forward_hook(lambda layer, args, out: out * 1.1)
    both(fast, prompt_ids())
    assert len(probed) == 7


def test_a_hook_that_acts_on_long_texts_only_is_probed_by_itself(probed: list[Guarantee]) -> None:
    def later(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.shape[1] < 99 else output * 1.1

    plain = attached()
    heard = build_tiny(seed=5, layers=4, hidden=64, inner=160)
    heard.model.layers[1].register_forward_hook(later)
    adapter = new_adapter(heard, tiny_config()).randomize(2)
    for _ in range(2):
        accelerate(heard, adapter)
        assert len(probed) == 2
    assert attached().guarantee.describe() == plain.guarantee.describe()
    assert len(probed) == 2


def test_a_broken_or_unwritable_verdict_costs_a_probe(probed: list[Guarantee], tmp_path: Path) -> None:
    few = {"exact": "bitwise", "tree_nodes": 4}
    attached(**few)
    [path] = tmp_path.glob("guarantees/*.json")
    good = json.loads(path.read_text())["guarantee"]
    name = next(iter(good["limits"]))
    fewer = {key: value for key, value in good["limits"].items() if key != name}
    broken = [
        {"level": "exactly"}, {"noise": -1}, {"noise": "much"}, {"noise": float("nan")}, {"limits": fewer}, {"limits": fewer | {"other": 3}},
        {"limits": good["limits"] | {"other": 3}}, {"limits": good["limits"] | {name: 0}}, {"limits": good["limits"] | {name: "all"}},
        {"level": "bitwise", "limits": None},
    ]  # fmt: skip
    whole = [{"guarantee": good | part, "digest": verdict._digest(good | part)} for part in broken]
    damaged = [{"guarantee": good | {"again": [2]}, "digest": verdict._digest(good)}, {"guarantee": good, "digest": ""}, {"guarantee": good}]
    for content in ("", "{", "[]", "{}", *map(json.dumps, [*whole, *damaged])):
        path.write_text(content)
        before = len(probed)
        assert attached(**few).guarantee == probed[-1]
        assert len(probed) == before + 1, content
        assert json.loads(path.read_text())["guarantee"] == good
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("no folder")
    assert attached(**few).guarantee == probed[-1]


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
def test_every_number_of_rows_is_probed_behind_a_short_and_a_long_text(
    schedule: str, probed: list[Guarantee], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, int, int, bool]] = set()
    real = StreamRunner.verify

    def verify(self: StreamRunner, ids: torch.Tensor, positions: torch.Tensor, mask: Any, cache: Any, nodes: Any, **rest: Any) -> Any:
        seen.add((self.limits is not None, cache.length, ids.shape[1], nodes is not None))
        return real(self, ids, positions, mask, cache, nodes, **rest)

    monkeypatch.setattr(StreamRunner, "verify", verify)
    for exact in ("near-tie", "bitwise"):
        attached(exact=exact, schedule=schedule)
    beside = (False, True) if schedule == "parallel" else (False,)
    rows = range(1, tiny_config().drafting.tree_nodes + 1)
    # of the 512 places of this base a tree and its streams must have some
    assert seen >= {(limited, text, n, s) for limited in (False, True) for text in (24, 487) for n in rows for s in beside}


def test_noise_that_only_one_number_of_rows_has_is_found(probed: list[Guarantee], monkeypatch: pytest.MonkeyPatch) -> None:
    real = StreamRunner.verify

    def moody(self: StreamRunner, ids: torch.Tensor, positions: torch.Tensor, mask: Any, cache: Any, nodes: Any, **rest: Any) -> Any:
        out = real(self, ids, positions, mask, cache, nodes, **rest)
        if ids.shape[1] == 17 and cache.length > 100:
            out.logits[..., ::2] += 0.002
        return out

    quiet = attached(exact="near-tie").guarantee
    monkeypatch.setattr(StreamRunner, "verify", moody)
    monkeypatch.setattr(verdict, "file_name", lambda depends: f"moody-{depends['wanted']}.json")
    assert quiet.noise < 0.001 < 0.03 < attached(exact="near-tie").guarantee.noise < 0.04
    with pytest.raises(UsageError, match="exact='bitwise' is not to be had"):
        attached(exact="bitwise")


def test_a_bound_that_was_exceeded_is_counted_and_widened_for_good(probed: list[Guarantee], tmp_path: Path) -> None:
    fast = attached(exact="near-tie")
    if fast.runner is fast.reader:
        pytest.skip("no twin here whose logits could be moved by themselves")
    both(fast, prompt_ids())
    assert fast.stats.exceeded == 0
    assert "promised" not in str(fast.stats)
    swing = 0.1 * torch.ones(fast.base.config.vocab_size).cumsum(0).mul(2).cos()
    fast.runner.model.get_output_embeddings().register_forward_hook(lambda head, args, out: out + swing)
    fast.attached.guarantee = Guarantee("near-tie", noise=0.05)
    for seed in range(3):
        fast.generate(prompt_ids(seed=seed), max_new_tokens=60, do_sample=False)
        if fast.stats.exceeded:
            break
    assert fast.stats.exceeded == 1  # then it is wide enough
    assert f"{fast.stats.exceeded} times logits moved further than was promised" in str(fast.stats)
    assert 0.4 < fast.guarantee.noise < 1
    for seed in range(3):
        expected, found = both(fast, prompt_ids(seed=seed), max_new_tokens=60)
        assert torch.equal(expected, found)
        assert fast.stats.exceeded == 0
    assert attached(exact="near-tie").guarantee.noise == fast.guarantee.noise
    [path] = tmp_path.glob("guarantees/*.json")
    narrow = probed[0]
    verdict.keep(path, fast.reader.model, narrow)  # another process that has seen less
    assert attached(exact="near-tie").guarantee.noise == fast.guarantee.noise
    assert len(probed) == 1


def test_passes_and_guarantees_are_checked() -> None:
    with pytest.raises(UsageError, match="rows must be at least 1, got 0"):
        Passes(0)
    with pytest.raises(UsageError, match="noise must be a number from 0 on, got nan"):
        Guarantee("near-tie", noise=float("nan"))
    assert list(Passes(2, True).each()) == [(1, False), (1, True), (2, False), (2, True)]
    assert Passes(3, True).covers(Passes(3))
    assert not Passes(3).covers(Passes(2, True))
    assert Guarantee("near-tie", noise=0.1).after(0.05).noise == 0.1
    assert Guarantee("near-tie", noise=0.1).after(0.2).noise == pytest.approx(exactness._SAFETY_COARSER * 0.2)
    assert 1e29 < Guarantee("near-tie", noise=0.1).after(float("inf")).noise < float("inf")  # a pass that overflowed
    assert Guarantee("near-tie", noise=0.1).after(float("nan")).noise == 0.1
