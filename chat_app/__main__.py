"""The command: `python -m chat_app`.

Knows: flags, exit codes (0 done, 2 bad input, 130 Ctrl-C), addresses. Does not know: what is served there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import warnings
from typing import Any

from lossless.cli.flags import Parser
from lossless.errors import UsageError

KEY_VARIABLE = "LOSSLESS_API_KEY"
_NEEDED = {"page": ("gradio", "fastapi", "uvicorn", "prometheus_client"), "api": ("fastapi", "uvicorn", "prometheus_client")}


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    logging.basicConfig(format="chat_app: %(levelname)s: %(message)s", level=logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        try:
            return _serve(_parser().parse_args(argv), read_key())
        except UsageError as error:
            print(f"chat_app: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # while the model loads
            print("chat_app: interrupted", file=sys.stderr)
            return 130


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"chat_app: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m chat_app", description="A chat page and an OpenAI-compatible endpoint on one accelerated model.")
    parser.add_argument("--model", default="demo", help="hub id, local folder, .gguf file, or 'demo' (%(default)s)")
    parser.add_argument("--adapter", help="folder or hub id of an adapter; the demo model brings its own, and without one answers are plain")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto (%(default)s)")
    parser.add_argument("--load-in", metavar="4bit|8bit", help="quantize while loading, with bitsandbytes")
    parser.add_argument("--device", help="a torch device; by default the GPU if there is one")
    parser.add_argument("--pack", action="store_true", help="pack the model's weights in place first: it answers faster by itself")
    parser.add_argument("--exact", help="bitwise, near-tie or off; by default what a probe finds")
    parser.add_argument("--host", default="127.0.0.1", help=f"where to listen; another than this machine only with a key in {KEY_VARIABLE} (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers as well; only with a key")
    parser.add_argument("--api-only", action="store_true", help="the endpoint without the page")
    return parser


def _serve(arguments: argparse.Namespace, key: str | None) -> int:
    _check(arguments, key)
    with _listening(arguments.host, arguments.port) as listener:  # before the model is loaded, which may take minutes
        import uvicorn

        from .api import build
        from .engine import load

        engine = load(
            arguments.model, arguments.adapter, arguments.dtype, arguments.load_in, arguments.device, arguments.pack, arguments.exact
        )
        app = build(engine, key)
        if not arguments.api_only:
            app = _with_page(app, engine, key)
        address = f"http://{_written(arguments.host)}:{listener.getsockname()[1]}"
        info = engine.info
        how = f"adapter {info.adapter}, exact: {info.exact}" if info.adapter else "plain: there is no adapter for it"
        print(f"{info.name}, {info.precision}, {info.device}, {info.threads} threads, {how}")
        print(f"{'Endpoint' if arguments.api_only else f'Page {address}/ and endpoint'} {address}/v1{'' if key is None else f', with the key in {KEY_VARIABLE}'}", flush=True)
        if arguments.share:
            print(f"Public {_tunnel(*listener.getsockname()[:2])}", flush=True)
        ending = threading.Thread(target=engine.close)

        class Server(uvicorn.Server):
            def handle_exit(self, *told: Any) -> None:
                """Answers end first, or the server would wait for them; and that a page is still open is no error then."""
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                if not self.should_exit:
                    ending.start()
                super().handle_exit(*told)

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops services ends it as Ctrl-C does
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends in order first, and raises it then
            Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[listener])
        if ending.is_alive():
            ending.join()
    print("chat_app: ended", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace, key: str | None) -> None:
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port must be between 0 and 65535, got {arguments.port}")
    if key is None and not is_loopback(arguments.host):
        raise UsageError(f"--host {arguments.host} lets other machines in, and that takes a key: set {KEY_VARIABLE}")
    if key is None and arguments.share:
        raise UsageError(f"--share lets everybody in, and that takes a key: set {KEY_VARIABLE}")
    if arguments.share and arguments.api_only:
        raise UsageError("--share is of the page, and --api-only leaves it out: choose one of them")
    missing = [name for name in _NEEDED["api" if arguments.api_only else "page"] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed: pip install 'lossless-streams[chat]' brings it")


def read_key() -> str | None:
    """The key that clients must send, or None. Raises UsageError if none could send it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key in {KEY_VARIABLE} must be of printable ASCII characters: clients send it in a header")
    return key or None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _written(host: str) -> str:
    """As it stands in an address."""
    return f"[{host.strip('[]')}]" if ":" in host else host


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UsageError if the place is taken or is none."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(found[4][:2], family=found[0])
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror if (error.errno or 0) <= 0 else os.strerror(error.errno or 0)}") from error
    except UnicodeError as error:  # no name of a machine can be written so
        raise UsageError(f"--host must be an address or the name of a machine, got {host!r}") from error


def _with_page(app: Any, engine: Any, key: str | None) -> Any:
    """The page at /; whoever opens it needs the key, too."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from .page import mount

    def known(_: str, password: str) -> bool:
        return secrets.compare_digest(password.encode(), (key or "").encode())

    auth = {} if key is None else {"auth": known, "auth_message": f"Any name; the password is the key in {KEY_VARIABLE}."}
    return mount(app, engine, **auth)


def _tunnel(host: str, port: int) -> str:
    """A public address of what listens there. Raises UsageError if there is none to be had."""
    from gradio.networking import setup_tunnel

    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        return str(setup_tunnel(here, port, secrets.token_urlsafe(32), None, None))
    except Exception as error:  # whatever stands between here and there
        raise UsageError(f"--share found no way to Gradio's servers: {error}") from error


if __name__ == "__main__":
    code = main()
    if code == 130:  # the thread that loads the model is in the midst of it, and must not see the interpreter go
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
