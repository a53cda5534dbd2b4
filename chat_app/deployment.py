"""The endpoint on several replicas and machines, with Ray Serve: `serve run chat_app.deployment:build model=demo replicas=2`.

Knows: what a replica is made of and needs, and which of Serve's own routers sends requests to it. Does not know: how requests are
routed, retried or refused, or how replicas are watched and started anew (Ray Serve), nor what is served (`api`).

**Conversations.** Each replica has an engine of its own, and keeps the keys and values of what it has answered. A client that sends
the header `x-session-id`, one value for each conversation, reaches the same replica with every turn: Serve's `ConsistentHashRouter`
hashes the value, and the proxies need no memory for it (`RAY_SERVE_SESSION_ID_HEADER_KEY` names another header). Requests without it
are spread by chance. A conversation goes to another replica while its own has `_ONGOING` requests, and for good when a replica comes
or goes that takes its place: its first turn there is read anew, with what that means in 16 bits (see `engine`).

**What dies with a replica.** Requests that it was answering get status 500; OpenAI's clients send such a request again, twice by
default, and it reaches a replica that lives. A stream that has begun is broken off: the client raises, and its caller must ask again.

Nothing is shared between replicas: `/metrics` shows the figures of the replica that answers it.

Serve's proxies listen on loopback by default; where the `http_options` of a config file say otherwise, replicas refuse to start without
a key. It is read from `LOSSLESS_API_KEY` where `build` runs, and travels to the replicas in Ray's own store.
"""

from __future__ import annotations

from typing import Any

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.context import _get_global_client

from lossless.errors import UsageError

from .__main__ import KEY_VARIABLE, is_loopback, read_key

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_ONGOING = 8  # requests at a replica before others go to its neighbour: reading a prompt anew is quicker than waiting behind more
_QUEUED = 64  # requests that wait in a proxy; more are refused with the status that clients wait and try again for


class Arguments(BaseModel):
    """What `serve run` takes as `name=value`, and a config file as `args`.

    Attributes:
        model, adapter, dtype, load_in, pack, exact: as the flags of `python -m chat_app`.
        replicas: engines, each with its own copy of the model.
        cpus: cores of a replica; PyTorch takes so many threads.
        gpus: of a replica; below 1 several replicas share one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "demo"
    adapter: str | None = None
    dtype: str = "auto"
    load_in: str | None = None
    pack: bool = False
    exact: str | None = None
    replicas: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)


class RefusedArguments(click.ClickException, UsageError):
    """Bad arguments: `serve run`, which is a click command, says them in one line and without a traceback."""


class Replica:
    """An engine behind the endpoint.

    Raises:
        UsageError: the model cannot be loaded, or others than this machine are let in without a key.
    """

    def __init__(self, arguments: Arguments, key: str | None) -> None:
        from .engine import load  # torch is for the replicas only

        serving = _get_global_client()  # raises if there is none
        check_host(serving.http_config.host if serving else None, key)
        self._key = key
        self._engine = load(
            arguments.model, arguments.adapter, arguments.dtype, arguments.load_in, packed=arguments.pack, exact=arguments.exact
        )

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        from .api import build

        return build(self._engine, self._key)


def check_host(host: str | None, key: str | None) -> None:
    """Raises UsageError if proxies that listen there let others in without a key."""
    if key is None and host is not None and not is_loopback(host):
        raise UsageError(f"http_options.host {host} lets other machines in, and that takes a key: set {KEY_VARIABLE}")


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application for Serve, from the fields of `Arguments`; nothing is loaded here.

    Raises:
        RefusedArguments: they are none, or the key is one that no client could send.
    """
    try:
        chosen, key = Arguments(**arguments), read_key()
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg'][0].lower()}{each['msg'][1:]}, got {each['input']!r}" for each in error.errors())
        raise RefusedArguments(f"{wrong}. There are {', '.join(Arguments.model_fields)}") from error
    except UsageError as error:
        raise RefusedArguments(str(error)) from error
    deployment = serve.deployment(
        name="lossless",
        num_replicas=chosen.replicas,
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        backpressure_config={"status_code": 429},
        ray_actor_options={"num_cpus": chosen.cpus, "num_gpus": chosen.gpus},
        request_router_config={"request_router_class": _ROUTER},
    )(serve.ingress()(Replica))
    return deployment.bind(chosen, key)
