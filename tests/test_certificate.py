"""The certificate finds what differs, and excuses only what lies within the base's own noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lossless.adapter.compat import new_adapter
from lossless.base.loading import Base, load_base
from lossless.cli.parser import main
from lossless.distillation.prompts import from_text
from lossless.errors import UsageError
from lossless.evaluation.bench import Decoding
from lossless.evaluation.certificate import asked, certify, force, measure_noise
from lossless.generation.model import accelerate

from .conftest import prompt_ids, tiny_config


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder), "float32")


NO_LOGITS = torch.zeros(1, 96)  # where ours do not matter
SAMPLED = Decoding(max_new_tokens=24, do_sample=True, temperature=0.8, top_p=0.9, seed=5)


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=24), SAMPLED], ids=["greedy", "sampled"])
def test_the_base_s_own_answer_is_identical_everywhere(base: Base, decoding: Decoding) -> None:
    ids = prompt_ids()
    torch.manual_seed(decoding.seed)
    options = decoding.arguments() | {"return_dict_in_generate": True, "output_logits": True}
    out = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = out.sequences[0, 7:].tolist()
    positions, seconds = force(base, ids, plain, out.logits, decoding)
    assert seconds > 0
    assert all(position.same_bits for position in positions)
    assert [position.chosen for position in positions] == plain
    assert all(position.gap == 0 and position.lead > 0 for position in positions)


def test_a_changed_token_is_found_and_the_rest_is_judged_in_its_own_context(base: Base) -> None:
    ids, decoding = prompt_ids(), Decoding(max_new_tokens=24)
    plain = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, 7:].tolist()
    wrong = (plain[9] + 1) % 90
    after = torch.tensor([[*ids[0].tolist(), *plain[:9], wrong]])
    rest = base.model.generate(after, attention_mask=torch.ones_like(after), max_new_tokens=14, do_sample=False)
    positions, _ = force(base, ids, [*plain[:9], wrong, *rest[0, after.shape[1] :].tolist()], [NO_LOGITS] * 24, decoding)
    assert not any(position.same_bits for position in positions)
    assert [i for i, position in enumerate(positions) if position.chosen != position.emitted] == [9]
    assert positions[9].chosen == plain[9]
    assert positions[9].gap > 1e-3


def test_a_token_that_was_cut_off_is_as_far_behind_as_it_stood_outside(base: Base) -> None:
    ids, decoding = prompt_ids(), Decoding(max_new_tokens=1, do_sample=True, top_p=0.3)
    logits = base.model(ids).logits[0, -1]
    last = int(logits.argmin())
    [position], _ = force(base, ids, [last], [NO_LOGITS], decoding)
    assert position.gap > 0.5
    assert position.gap < float("inf")


def test_noise_is_small_in_float32_and_larger_in_bfloat16(base: Base, tiny_folder: Path) -> None:
    texts = [prompt_ids(60, seed).tolist()[0] for seed in range(3)]
    fine, coarse = measure_noise(base, texts, rows=40), measure_noise(load_base(str(tiny_folder), "bfloat16"), texts, rows=40)
    assert fine["max"] < 1e-4 < coarse["max"] < 2
    assert fine["flips_per_1000"] == 0
    assert fine["positions"] == 3 * 40 * 7


def test_a_certificate_counts_and_shows_a_defect(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1))
    prompts = [from_text(f"w{i} w{i + 1} w9") for i in range(4)]
    good = certify(base, fast, "random", asked(base, prompts, SAMPLED), SAMPLED, None)
    assert (good["prompts"], good["identical_prompts"], good["near_ties"], good["mismatches"]) == (4, 4, 0, 0)
    assert good["tokens"] == 4 * 24
    assert good["worst"] == 0
    assert good["guarantee"]["exact"] == fast.guarantee.level

    real = fast.generate

    def faulty(ids: torch.Tensor, **kwargs: object) -> object:
        out = real(ids, **kwargs)
        out.sequences[0, -3] = (out.sequences[0, -3] + 1) % 90
        return out

    monkeypatch.setattr(fast, "generate", faulty)
    bad = certify(base, fast, "random", asked(base, prompts, Decoding(max_new_tokens=24)), Decoding(max_new_tokens=24), None)
    assert bad["identical_prompts"] == 0
    assert bad["mismatches"] >= 4
    assert bad["runs"][0]["first"]["token"] == 21
    assert bad["worst"] > bad["noise"]["limit"]


def test_an_interrupted_certificate_goes_on_after_the_answers_that_it_has(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1))
    prompts = [from_text(f"w{i} w{i + 1} w9") for i in range(4)]
    whole = certify(base, fast, "random", asked(base, prompts, SAMPLED), SAMPLED, None)
    journal, real, calls = tmp_path / "journal", fast.generate, []

    def third_time_unlucky(ids: torch.Tensor, **kwargs: object) -> object:
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(ids, **kwargs)

    monkeypatch.setattr(fast, "generate", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        certify(base, fast, "random", asked(base, prompts, SAMPLED), SAMPLED, None, journal)
    journal.write_text(journal.read_text() + '{"positions": [[1, 1, 0.')  # and it was killed in the middle of a line
    with pytest.raises(UsageError, match=r"other settings .decoding.: use them again, or remove it"):
        certify(base, fast, "random", asked(base, prompts, Decoding(max_new_tokens=24)), Decoding(max_new_tokens=24), None, journal)
    resumed = certify(base, fast, "random", asked(base, prompts, SAMPLED), SAMPLED, None, journal)
    assert len(calls) == 5
    timed = ("speedup",)
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


@pytest.mark.parametrize("token", [-1, 2**40])
def test_a_journal_with_a_token_that_no_model_has(base: Base, tmp_path: Path, token: int) -> None:
    fast = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1))
    journal, which = tmp_path / "journal", asked(base, [from_text("w1 w2")], SAMPLED)
    certify(base, fast, "random", which, SAMPLED, None, journal)
    first, line = journal.read_text().splitlines()
    broken = json.loads(line)
    broken["positions"][0][1] = token
    journal.write_text(f"{first}\n{json.dumps(broken)}\n")
    with pytest.raises(UsageError, match=rf"tokens must be at least 0 and below \d+, got \d+ and {token}.*: remove the journal"):
        certify(base, fast, "random", which, SAMPLED, None, journal)


def test_the_command_writes_a_certificate(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_base(str(tiny_folder), "float32")
    new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(tmp_path / "adapter")
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5"}\n')
    arguments = ["verify", "--model", str(tiny_folder), "--adapter", str(tmp_path / "adapter"), "--dtype", "float32"]
    arguments += ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "12", "--json", str(tmp_path / "c.json")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert {"prompts", "tokens", "identical_prompts", "near_ties", "mismatches", "noise", "worst"} <= found.keys()
    assert found["identical_prompts"] == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("c.json")) == ["c.json"]
    assert "identical answers   2 of 2" in capsys.readouterr().out
