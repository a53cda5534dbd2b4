"""What the READMEs tell people to type is what works, and every number in them is a stored one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lossless.adapter.hub import shipped_adapter
from lossless.base.loading import Base
from lossless.cli.parser import _parser, main
from lossless.training.ablation import VARIANTS

from . import tables
from .tables import ROOT, TABLES, between, reports

DOCUMENTS = {path: (ROOT / path).read_text(encoding="utf-8") for path in (*TABLES, "lossless/README.md", "chat_app/README.md", "tests/conformance/README.md", "data/README.md")}
README = DOCUMENTS["README.md"]


def commands() -> list[list[str]]:
    """Every `lossless ...` in their shell blocks, the first page's first, those that are held to AVX2 too."""
    found = []
    for text in DOCUMENTS.values():
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    words = shlex.split(re.sub(r"python -m tests.older \w+", "lossless", part), comments=True)
                    if words and Path(words[0]).name == "lossless":
                        found.append(words[1:])
    return found


def test_every_command_parses_and_is_shown() -> None:
    known = _parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert {words[0] for words in commands()} == set(known)  # type: ignore[arg-type]
    for words in commands():
        _parser().parse_args(words)


def test_every_link_leads_somewhere() -> None:
    for path, text in DOCUMENTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            place, _, heading = link.partition("#")
            if place.startswith("http"):
                continue
            target = (ROOT / path).parent / place if place else ROOT / path
            assert target.exists(), (path, link)
            if heading:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, (path, link)


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_the_first_page_counts_the_families_that_are_served() -> None:
    served = re.findall(r"^\| served[^|]*\| (\d+) \|", DOCUMENTS["tests/conformance/README.md"], re.MULTILINE)
    assert f"{sum(map(int, served))} families are tested" in README


def test_the_main_command_answers_and_is_identical(demo: Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = next(words for words in commands() if words[0] == "compare")
    assert main([*words, "--max-new-tokens", "24"]) == 0
    assert "identical: all 24 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, made in TABLES.items() for name in made])
def test_every_number_comes_from_a_stored_report(path: str, name: str) -> None:
    assert between(DOCUMENTS[path], name) == TABLES[path][name]()


def test_no_report_is_left_out() -> None:
    kinds = {path.name.partition("-")[0] for path in tables.REPORTS.glob("*.json")}
    assert kinds == {"speed", "memory", "certificate", "verify", "benchmarks", "accept", "ablation", "pruning", "paper", "chat", "versions", "gpu"}


def test_reports_are_of_the_versions_that_are_named() -> None:
    text = " ".join(DOCUMENTS["lossless/evaluation/README.md"].split())
    for kind in ("speed", "memory"):
        for found in reports(kind).values():
            assert f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}" in text


def test_what_was_measured_on_a_gpu_names_it() -> None:
    text = " ".join(DOCUMENTS["lossless/README.md"].split())
    for found in reports("gpu").values():
        assert f"| {found['device']} |" in text
        assert f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}" in text


def test_certificates_found_no_mismatch() -> None:
    for kind in ("certificate", "benchmarks", "verify"):
        assert all(found["mismatches"] == 0 for found in reports(kind).values())


def test_the_ablations_leave_no_variant_out() -> None:
    assert {row["name"] for report in reports("ablation").values() for row in report["variants"]} == {variant.name for variant in VARIANTS}
    [training] = reports("paper").values()
    assert f"foretold {training['acceptance_length']:.2f} (`paper-training.json`)" in DOCUMENTS["lossless/adapters/demo/README.md"]


def test_the_shipped_adapter_is_small_and_there() -> None:
    folder = shipped_adapter("demo")
    assert folder is not None
    assert sum(f.stat().st_size for f in Path(folder).iterdir()) <= 16 * 2**20
    assert json.loads((Path(folder) / "certificate.json").read_text(encoding="utf-8"))["mismatches"] == 0
    assert shipped_adapter("some/other") is None


@pytest.mark.parametrize("options", [[], ["--do-sample", "--temperature", "0.8", "--seed", "3"]], ids=["greedy", "sampled"])
def test_the_demo_model_is_lossless_in_float32(demo: Base, options: list[str], tmp_path: Path) -> None:
    arguments = ["bench", "--model", "demo", "--dtype", "float32", "--prompts", str(ROOT / "data" / "prompts.jsonl")]
    assert main([*arguments, "--limit", "2", "--max-new-tokens", "32", *options]) == 0
