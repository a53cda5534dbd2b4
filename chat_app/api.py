"""HTTP for programs: OpenAI's endpoints, whether all is well, and figures for Prometheus.

Knows: status codes, keys, streams of events, clients that go away. Does not know: what the fields of a request mean, or how answers
are made. Requests are asked one after the other, whoever sends them; a client that disconnects gives its place up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from lossless.errors import UsageError

from .answer import Answer, Waiting, Way
from .engine import Engine
from .protocol import Refusal, Reply, described, figures, parse, refusal, require_served

MOST_BYTES = 4 * 2**20  # of a request
_CONVERSATIONS = 8  # texts whose rows are kept for programs, which send whole conversations, several in turn
_LOOK_S = 0.25  # how often a client is looked for that may have gone away
_GONE = 499  # what servers note of a client that did not wait


def build(engine: Engine, key: str | None = None) -> FastAPI:
    """The application.

    Args:
        key: what a client must send as a bearer token; None lets everybody in.
    """
    app = FastAPI(title="lossless", docs_url=None, redoc_url=None, openapi_url=None)
    conversation = engine.conversation(_CONVERSATIONS)
    registry = CollectorRegistry()
    registry.register(_Figures(engine))

    def admitted(request: Request) -> None:
        given = request.headers.get("authorization", "").partition(" ")
        if key is not None and not (given[0].lower() == "bearer" and hmac.compare_digest(given[2].strip().encode(), key.encode())):
            raise Refusal("a valid key must be sent as a bearer token", 401, "authentication_error", code="invalid_api_key")

    async def answer(request: Request, chat: bool) -> Response:
        asked = parse(await _body(request), chat, engine.info)
        gone = threading.Event()
        way: Way = "plain" if engine.fast is None else "accelerated"
        settings = [replace(asked.settings, seed=asked.settings.seed + number) for number in range(asked.choices)]
        # tokens of long prompts are counted in a thread of their own: others are served meanwhile
        choices: list[Iterator[Waiting | Answer]] = [
            await asyncio.to_thread(engine.answer, asked.messages, each, way, conversation, gone.is_set, asked.logprobs) for each in settings
        ]
        reply = Reply(asked, engine.info.name, lambda token: engine.tokenizer.decode([token]))
        if asked.stream:
            chunks = _stream(request, reply, choices, gone)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answers = []
        for choice in choices:
            picture = None
            async with contextlib.aclosing(_events(request, choice, gone)) as pictures:
                async for newer in pictures:
                    picture = newer
            if picture is None or gone.is_set():
                return Response(status_code=_GONE)
            answers.append(_finished(picture))
        return JSONResponse(reply.whole(answers))

    @app.post("/v1/chat/completions", dependencies=[Depends(admitted)])
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    @app.post("/v1/completions", dependencies=[Depends(admitted)])
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.get("/v1/models", dependencies=[Depends(admitted)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(engine.info)]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(admitted)])
    async def model(name: str) -> dict[str, Any]:
        require_served(name, engine.info)
        return described(engine.info)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(admitted)])
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, error: Refusal) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(UsageError)
    async def mistaken(request: Request, error: UsageError) -> Response:
        return await refuse(request, refusal(error, chat="/chat/" in request.url.path))

    @app.exception_handler(StarletteHTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        return await refuse(request, Refusal(f"{request.method} {request.url.path}: {error.detail}", error.status_code))

    @app.exception_handler(Exception)
    async def defect(request: Request, _: Exception) -> Response:
        return await refuse(request, Refusal("the server has a defect, and has noted it", 500, "server_error"))

    return app


async def _body(request: Request) -> Any:
    """The request's JSON, read only as far as it may go."""
    # a page elsewhere can have a browser send anything else without being asked whether it may
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal("the content type must be application/json", 415)
    read = bytearray()
    try:
        async for part in request.stream():
            read += part
            if len(read) > MOST_BYTES:
                raise Refusal(f"a request may have at most {MOST_BYTES} bytes", 413)
    except ClientDisconnect as error:
        raise Refusal("the client has gone", _GONE) from error
    try:
        return json.loads(read)
    except (ValueError, RecursionError) as error:
        raise Refusal("the body must be JSON") from error


async def _events(request: Request, answers: Iterator[Waiting | Answer], gone: threading.Event) -> AsyncGenerator[Answer, None]:
    """Pictures of an answer; the latest one only, if the client is slower than they come. None after the client has gone."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    latest: list[Answer] = []
    failures: list[Exception] = []
    over = False

    def post(picture: Answer | None) -> None:
        nonlocal over
        latest[:] = latest if picture is None else [picture]
        over = over or picture is None
        ready.set()

    def tell(picture: Answer | None) -> None:
        try:
            loop.call_soon_threadsafe(post, picture)
        except RuntimeError:  # the loop has been closed: nobody listens any more
            gone.set()

    def pump() -> None:
        try:
            for event in answers:
                if isinstance(event, Answer):
                    tell(event)
        except Exception as error:
            failures.append(error)
        finally:
            tell(None)

    threading.Thread(target=pump, name="answer", daemon=True).start()
    try:
        while not gone.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ready.wait(), _LOOK_S)
            ready.clear()
            if await request.is_disconnected():
                return
            if latest:
                yield latest.pop()
            if over and not latest:
                for failure in failures:
                    raise failure
                return
    finally:
        if not over:
            gone.set()


def _finished(answer: Answer) -> Answer:
    """The answer, if it came to its end. Raises Refusal if not."""
    if answer.ending == "error":
        raise Refusal(answer.why, 500, "server_error")
    if answer.ending == "cancelled":
        raise Refusal("the server is ending", 503, "server_error")
    return answer


async def _stream(
    request: Request, reply: Reply, choices: Sequence[Iterator[Waiting | Answer]], gone: threading.Event
) -> AsyncGenerator[str, None]:
    """Server-sent events: each choice's chunks, one choice after the other.

    With logprobs a choice is sent at its end: they are not there before.
    """
    asked, answers = reply.request, list[Answer]()
    try:
        for index, choice in enumerate(choices):
            if asked.chat:
                yield _event(reply.opening(index))
            sent, picture = 0, None
            async with contextlib.aclosing(_events(request, choice, gone)) as pictures:
                async for picture in pictures:
                    if picture.ending is None and asked.logprobs is None and len(picture.text) > sent:
                        yield _event(reply.growth(index, picture.text[sent:]))
                        sent = len(picture.text)
            if picture is None or gone.is_set():
                return
            answers.append(_finished(picture))
            if asked.logprobs is None and len(picture.text) > sent:
                yield _event(reply.growth(index, picture.text[sent:]))
                sent = len(picture.text)
            last = reply.growth(index, picture.text[sent:], picture)
            if len(answers) == asked.choices:
                last["lossless"] = figures(answers)
            yield _event(last)
        if asked.include_usage:
            yield _event(reply.counts(answers))
        yield "data: [DONE]\n\n"
    except Refusal as error:
        yield _event(error.body)
    finally:
        gone.set()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Figures:
    """What the engine counts, as Prometheus wants it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counted = {
            "answers": "Answers that have ended",
            "tokens": "Tokens of answers",
            "prompt_tokens": "Tokens of prompts",
            "cached_tokens": "Tokens of prompts that had been read in an earlier turn",
            "target_passes": "Passes of the model behind the prompts",
            "seconds": "Seconds from the start of an answer to its last token",
        }
        totals = self._engine.totals()
        for name, meaning in counted.items():
            family = CounterMetricFamily(f"lossless_{name}", meaning, labels=("way", "ending"))
            for labels, total in totals.items():
                family.add_metric(labels, getattr(total, name))
            yield family
        speed = self._engine.plain_tokens_per_s
        yield GaugeMetricFamily("lossless_waiting", "Answers that wait or are being made", value=self._engine.waiting)
        yield GaugeMetricFamily("lossless_kept_bytes", "Keys and values kept between turns", value=self._engine.kept_bytes)
        yield GaugeMetricFamily("lossless_plain_tokens_per_second", "Median of plain answers", value=float("nan") if speed is None else speed)
