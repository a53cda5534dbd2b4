"""Two replicas behind Ray Serve: the base's own answers, conversations where their rows are, and none lost with a replica.

Each request is one call of OpenAI's client, with its own retries (two at most): that it asks again when a replica has died is part of
what is tested, and each attempt's status is noted.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from chat_app.settings import Settings
from lossless.adapter.compat import new_adapter
from lossless.base.loading import Base
from lossless.errors import UsageError
from tests.conftest import tiny_config

from .conftest import assistant, expected, until, user

ROOT = Path(__file__).parent.parent.parent
KEY = "secret"

# Ray in a process of its own: its warnings are not ours, and it ends with its standard input
_SERVE = """
import sys, ray
from ray import serve
from chat_app.deployment import build
model, adapter, port = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False)
serve.start(http_options={"port": int(port)})
serve.run(build({"model": model, "adapter": adapter, "dtype": "float32", "replicas": 2}))
print("serving", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random numbers for the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(folder)
    return folder


class Cluster:
    """Serve, its address, and what its processes are."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self._process, self.address = psutil.Process(process.pid), address
        headers = {"authorization": f"Bearer {KEY}"}
        self.model = httpx.get(f"{address}/v1/models", headers=headers, timeout=60).json()["data"][0]["id"]

    def processes(self) -> list[psutil.Process]:
        return list(self._process.children(recursive=True))

    def replicas(self) -> set[int]:
        """Their process ids."""
        found = set()
        for process in self.processes():
            try:
                if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                    found.add(process.pid)
            except psutil.Error:  # it has ended meanwhile
                continue
        return found


    def counts(self) -> str:
        """What the replica that is reached has answered so far; requests without a session go now to one, now to another."""
        found = httpx.get(f"{self.address}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60)
        found.raise_for_status()
        return "".join(line for line in found.text.splitlines() if line.startswith("lossless_answers_total"))


@pytest.fixture(scope="module")
def cluster(tiny_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'lossless-streams[serve]' brings it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "LOSSLESS_API_KEY": KEY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts slowly
    }  # fmt: skip
    log = tmp_path_factory.mktemp("serve") / "log"
    line = [sys.executable, "-c", _SERVE, str(tiny_folder), str(adapter), str(port)]
    with (
        log.open("w") as errors,
        subprocess.Popen(line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        started: list[psutil.Process] = []
        try:
            assert process.stdout is not None
            assert any(line == "serving\n" for line in process.stdout), log.read_text()[-4000:]
            made = Cluster(process, f"http://127.0.0.1:{port}")
            yield made
            started = made.processes()
            process.communicate(timeout=120)
        finally:
            started = started or psutil.Process(process.pid).children(recursive=True)
            process.kill()
            _, left = psutil.wait_procs(started, timeout=30)
            for each in left:
                each.kill()
    assert not left, left


class Client:
    """OpenAI's client; the statuses of each request's attempts are noted under its name."""

    def __init__(self, cluster: Cluster) -> None:
        self.statuses: dict[str, list[int]] = defaultdict(list)
        noting = openai.DefaultHttpxClient(event_hooks={"response": [self._note]})
        self._client = openai.OpenAI(base_url=f"{cluster.address}/v1", api_key=KEY, http_client=noting, timeout=120)
        self._model = cluster.model

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _note(self, response: httpx.Response) -> None:
        self.statuses[response.request.headers["x-name"]].append(response.status_code)

    def ask(self, name: str, session: str, messages: list[dict[str, str]], tokens: int) -> Any:
        headers = {"x-session-id": session, "x-name": name}
        return self._client.chat.completions.create(
            model=self._model, messages=messages, max_tokens=tokens, temperature=0, extra_headers=headers  # type: ignore[arg-type]
        )  # fmt: skip


def text(base: Base, messages: list[dict[str, str]], tokens: int) -> str:
    """What the base answers by itself."""
    return str(base.tokenizer.decode(expected(base, messages, Settings(max_tokens=tokens)), skip_special_tokens=True))


def conversations_find_their_rows(cluster: Cluster, base: Base, first: int = 0) -> None:
    conversations = {f"talk {number}": [user(f"w{number} w{number + 20} w5")] for number in range(first, first + 6)}
    read: dict[str, int] = {}
    with Client(cluster) as client:
        for turn in range(3):
            for session, messages in conversations.items():
                found = client.ask(f"{session} {turn}", session, messages, 12)
                answer = found.choices[0].message.content
                assert answer == text(base, messages, 12)
                assert found.model_extra["lossless"]["accelerated"] is True
                # conversations have their first token in common: more of the prompt before has only the replica that read it
                cached = found.usage.prompt_tokens_details.cached_tokens
                assert cached >= read[session] - 1 if turn else cached <= 1, (session, turn, cached)
                read[session] = found.usage.prompt_tokens
                messages += [assistant(answer), user(f"w{turn + 40}")]
    assert {status for found in client.statuses.values() for status in found} == {200}


def a_killed_replica_takes_no_request_with_it(cluster: Cluster, base: Base) -> None:
    tokens = 60
    asked = {f"request {number}": [user(f"w3 w{number % 16} w{number % 16 + 30}")] for number in range(48)}
    right = {said: text(base, [user(said)], tokens) for said in {messages[0]["content"] for messages in asked.values()}}
    before = cluster.replicas()
    assert len(before) == 2
    victim, finished = min(before), threading.Semaphore(0)

    def ask(client: Client, name: str, messages: list[dict[str, str]]) -> str:
        found = client.ask(name, f"session {name}", messages, tokens).choices[0].message.content
        finished.release()
        return str(found)

    def kill() -> None:
        for _ in range(8):
            assert finished.acquire(timeout=120)
        os.kill(victim, signal.SIGKILL)

    with Client(cluster) as client, ThreadPoolExecutor(7) as pool:
        killing = pool.submit(kill)
        answers = {name: pool.submit(ask, client, name, messages) for name, messages in asked.items()}
        killing.result(240)
        assert sum(not answer.done() for answer in answers.values()) > 6, "the replica was to be killed under load"
        for name, answer in answers.items():
            assert answer.result(240) == right[asked[name][0]["content"]]
    assert set(client.statuses) == set(asked)
    for name, statuses in client.statuses.items():
        assert statuses.count(200) == 1, (name, statuses)
        assert all(status >= 500 for status in statuses[:-1]), (name, statuses)
    until(lambda: victim not in cluster.replicas() and len(cluster.replicas()) == 2, looks=2400)  # Serve starts another by itself
    reached: set[str] = set()

    def both_are_reached() -> bool:
        reached.add(cluster.counts())
        return len(reached) > 1

    until(both_are_reached, looks=2400)


def test_two_replicas(cluster: Cluster, base: Base) -> None:
    """One test, so that workers of pytest do not each start Ray."""
    assert httpx.get(f"{cluster.address}/v1/models").status_code == 401
    conversations_find_their_rows(cluster, base)
    a_killed_replica_takes_no_request_with_it(cluster, base)
    conversations_find_their_rows(cluster, base, first=10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"replicas": "0"}, "replicas: input should be greater than or equal to 1, got '0'. There are model, adapter,"),
        ({"models": "demo"}, "models: extra inputs are not permitted, got 'demo'. There are model,"),
    ],
)
def test_arguments_that_are_none(arguments: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'lossless-streams[serve]' brings it")
    import click

    from chat_app.deployment import build

    with pytest.raises(SystemExit):  # as `serve run` ends
        click.command()(lambda: build(arguments)).main([])
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_others_are_let_in_with_a_key_only() -> None:
    pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'lossless-streams[serve]' brings it")
    from chat_app.deployment import check_host

    check_host("127.0.0.1", None)
    check_host("0.0.0.0", KEY)
    with pytest.raises(UsageError, match=r"http_options.host 0\.0\.0\.0 lets other machines in"):
        check_host("0.0.0.0", None)
