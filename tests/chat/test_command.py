"""`python -m chat_app`: what it refuses in one line, and that it serves and ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chat_app import __main__ as command
from tests.forked import Forked

from .conftest import until

ROOT = Path(__file__).parent.parent.parent
NO_MODEL = ["--api-only", "--port", "0", "--model", "./nowhere"]  # what is not refused before ends here, and not with a server


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and that takes a key: set LOSSLESS_API_KEY"),
        (["--host", "::"], "--host :: lets other machines in"),
        (["--host", "example.org"], "--host example.org lets other machines in"),
        (["--share"], "--share lets everybody in, and that takes a key"),
        (["--host", "127.0.0.300"], "--host 127.0.0.300 lets other machines in"),
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--api-only", "--port", "0", "--model", "./nowhere"], "no model folder or GGUF file at nowhere"),
        (["--api-only", "--port", "0", "--dtype", "float99"], "dtype must be one of"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--port", "many"], "invalid int value: 'many'"), (["--unheard-of"], "unrecognized arguments: --unheard-of"), (["--adaptor", "x"], "did you mean '--adapter'?")],
)
def test_flags_that_are_none(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["--api-only", "--port", str(port)]) == 2
    assert re.fullmatch(rf"chat_app: cannot listen on 127\.0\.0\.1, port {port}: Address already in use\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("host", "said"),
    [("a..b", "--host must be an address or the name of a machine, got 'a..b'"), ("192.0.2.1", "cannot listen on 192.0.2.1, port 0: ")],
)
def test_a_host_that_is_none_of_this_machine(host: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, "secret")
    assert command.main(["--api-only", "--host", host, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"chat_app: {said}")
    assert error.count("\n") == 1


def test_a_blank_key_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, " \n")
    assert command.main([*NO_MODEL, "--host", "0.0.0.0"]) == 2
    assert "that takes a key" in capsys.readouterr().err


def test_a_key_that_no_header_carries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, "s\u00e9cret")
    assert command.main(NO_MODEL) == 2
    assert capsys.readouterr().err == "chat_app: the key in LOSSLESS_API_KEY must be of printable ASCII characters: clients send it in a header\n"


@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("192.168.1.5", "192.168.1.5")])
def test_a_public_address_leads_to_where_it_listens(host: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networking = pytest.importorskip("gradio.networking")
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(networking, "setup_tunnel", lambda host, port, *_: asked.append((host, port)) or "https://x.gradio.live")
    assert command._tunnel(host, 7860) == "https://x.gradio.live"
    assert asked == [(told, 7860)]


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "gradio" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert command.main([]) == 2
    assert capsys.readouterr().err == "chat_app: gradio is not installed: pip install 'lossless-streams[chat]' brings it\n"


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[tuple[Forked, str, str]]:
    """The command in a process of its own: the process, its address, and what it printed until then."""
    process = Forked(folder, command.main, ["--api-only", "--port", "0", *arguments], changed=environment)
    try:
        until(lambda: "/v1" in process.output() or not process.running)
        address = re.search(r"http://\S+(?=/v1)", process.output())
        assert address, process.output()
        yield process, address[0], process.said.read_text()
    finally:
        process.kill()


def has_ended(process: Forked) -> None:
    """In order, with one line."""
    code, _ = process.finish()
    assert (code, process.told.read_text()) == (0, "chat_app: ended\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_ends_with_one_line(tiny_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "--model", str(tiny_folder), "--dtype", "float32") as (process, address, said):
        assert "plain: there is no adapter for it" in said
        [model] = httpx.get(f"{address}/v1/models").json()["data"]
        body = {"model": model["id"], "messages": [{"role": "user", "content": "w5"}], "max_tokens": 3}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).json()["lossless"]["accelerated"] is False
        process.signal(number)
        has_ended(process)


def test_it_ends_while_an_answer_is_made(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--model", str(tiny_folder), "--dtype", "float32") as (process, address, _):
        [model] = httpx.get(f"{address}/v1/models").json()["data"]
        body = {"model": model["id"], "messages": [{"role": "user", "content": "w5"}], "max_tokens": 4096, "stream": True, "n": 8}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as found:
            lines = found.iter_lines()
            next(lines)
            process.signal(signal.SIGINT)
            assert '"message": "the server is ending"' in [line for line in lines if line][-1]
        has_ended(process)


def test_the_module_serves_and_with_a_key_others_are_let_in(tiny_folder: Path) -> None:
    line = [sys.executable, "-m", "chat_app", "--api-only", "--port", "0", "--model", str(tiny_folder), "--host", "0.0.0.0"]
    environment = os.environ | {"LOSSLESS_API_KEY": "secret"}
    with subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline() + process.stdout.readline()
            address = re.search(r"http://\S+(?=/v1)", said)
            assert address, said
            assert "secret" not in said
            here = address[0].replace("0.0.0.0", "127.0.0.1")
            assert httpx.get(f"{here}/v1/models").status_code == 401
            assert httpx.get(f"{here}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        finally:
            process.kill()
