"""An adapter goes to the hub and comes back, by huggingface_hub's own machinery, at an endpoint that is a stub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lossless.adapter.compat import new_adapter
from lossless.base.loading import load_base

from .commands import run_all
from .conftest import tiny_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload and a download ask for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != "Bearer right":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"http://{self.headers['Host']}/owner/streams"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/owner/streams/commit/{COMMIT}"})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/streams/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in self.files.items()]
            self.answer(200, entries)
        elif path.startswith("/api/models/owner/streams"):
            self.answer(200, {"id": "owner/streams", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files],
                              "tags": [], "private": False, "downloads": 0, "likes": 0})  # fmt: skip
        elif path.startswith("/owner/streams/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            content = self.files[name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
        else:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items() | (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    kind = type("Stub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind
    server.shutdown()
    server.server_close()


def test_an_adapter_goes_to_the_hub_and_comes_back(hub: Any, tiny_folder: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_folder), "float32")
    folder = tmp_path / "adapter"
    new_adapter(base.model, tiny_config(), base.tokenizer).randomize(1).save_pretrained(folder)
    (folder / "README.md").write_text("# a card\n")
    (folder / "events.out.tfevents.1").write_bytes(b"not for the hub")
    (folder / "checkpoint-000001").mkdir()
    (folder / "checkpoint-000001" / "progress.json").write_bytes(b"not for the hub")
    (folder / "checkpoint-000001" / "optimizer.bin").write_bytes(b"not for the hub")

    environment = {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    push = ("push", "--adapter", str(folder), "--repo", "owner/streams")
    ask = ("compare", "--model", str(tiny_folder), "--dtype", "float32", "--prompt", "w1 w2", "--max-new-tokens", "8", "--adapter")
    right = {"HF_TOKEN": "right"}
    nothing_there = ("push", "--adapter", str(tmp_path), "--repo", "owner/streams")
    refused, pushed, nothing = run_all([(push, {"HF_TOKEN": "wrong"}), (push, right), (nothing_there, right)], environment)
    found, branch, missing = run_all([((*ask, f"owner/{name}"), right) for name in ("streams", "streams@other", "none")], environment)
    assert refused.returncode == 2
    assert "the hub did not take" in refused.stderr
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.address}/owner/streams" in pushed.stdout
    assert sorted(hub.files) == ["README.md", "adapter.safetensors", "adapter_config.json"]
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes()

    assert found.returncode == 0, found.stderr
    assert "identical: all 8 tokens" in found.stdout
    assert any("/resolve/" in line and "/other/" not in line and "adapter.safetensors" in line for line in hub.asked)
    assert branch.returncode == 0, branch.stderr
    assert any("/resolve/other/" in line for line in hub.asked)
    assert missing.returncode == 2
    assert "no adapter folder" in missing.stderr
    assert nothing.returncode == 2
    assert "no adapter in" in nothing.stderr
