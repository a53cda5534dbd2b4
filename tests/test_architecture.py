"""Packages import only from those below them, and modules stay of a size that one reads at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import lossless

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("lossless", "chat_app") for path in (ROOT / folder).rglob("*.py"))


def test_each_package_imports_only_from_those_below_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)  # it would silence every logger for the tests that come behind
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_is_read_at_once_and_says_what_it_knows(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.startswith('"""')
    assert source.count("\n") <= 350
    if path.name not in ("__init__.py", "__main__.py"):
        said = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
        assert " Knows: " in said
        assert " Does not know: " in said


def test_what_is_public_is_listed_and_documented() -> None:
    listed = (ROOT / "lossless" / "README.md").read_text(encoding="utf-8").partition("## What is public")[2].partition("\n## ")[0]
    assert lossless.__all__ == sorted(lossless.__all__)
    for name in lossless.__all__:
        assert getattr(lossless, name).__doc__, name
        assert name in (lossless.__doc__ or ""), name
        assert f"`{name}" in listed, name
    assert not {name for name in vars(lossless) if name[0].isupper()} - set(lossless.__all__)
