"""Programs get the base's own answers through OpenAI's client, and errors that it understands."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from chat_app.answer import Info
from chat_app.api import MOST_BYTES, build
from chat_app.engine import Engine
from chat_app.settings import Settings
from lossless.adapter.hub import shipped_adapter
from lossless.base.loading import Base
from lossless.generation.model import accelerate

from .conftest import Hold, assistant, engine_over, expected, until, user


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The application behind a real server on a free port; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(build(engine)) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as found:
        yield found


def words(base: Base, tokens: list[int]) -> str:
    return str(base.tokenizer.decode(tokens, skip_special_tokens=True))


def test_a_chat(client: openai.OpenAI, base: Base) -> None:
    found = client.chat.completions.create(model="tiny", messages=[user("w5 w6")], max_tokens=20, temperature=0)  # type: ignore[list-item]
    tokens = expected(base, [user("w5 w6")], Settings(max_tokens=20))
    [choice] = found.choices
    assert choice.message.content == words(base, tokens)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.completion_tokens, found.usage.total_tokens - found.usage.prompt_tokens) == (20, 20)
    figures = found.model_extra["lossless"]  # type: ignore[index]
    assert figures["accelerated"] is True
    assert figures["acceptance_length"] == pytest.approx(19 / figures["target_passes"])
    assert figures["tokens_per_s"] > 0
    assert figures["first_s"] > 0


def test_a_stream(client: openai.OpenAI, base: Base) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=[user("w5 w6")], max_completion_tokens=60, temperature=0.9, top_p=0.8, seed=3, stream=True,
        stream_options={"include_usage": True},
    )  # type: ignore[call-overload]  # fmt: skip
    *chunks, counted = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == words(base, expected(base, [user("w5 w6")], Settings(0.9, 0.8, 3, 60)))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].model_extra["lossless"]["target_passes"] > 0
    assert counted.choices == []
    assert counted.usage.completion_tokens == 60


def test_a_streams_events(address: str) -> None:
    body = {"model": "tiny", "messages": [user("w5")], "stream": True, "max_tokens": 5}
    found = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_a_text_is_gone_on_with(client: openai.OpenAI, base: Base) -> None:
    found = client.completions.create(model="tiny", prompt="w5 w6", temperature=0)
    assert found.choices[0].text == words(base, expected(base, "w5 w6", Settings(max_tokens=16)))
    stream = client.completions.create(model="tiny", prompt=["w5 w6"], temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_several_choices_have_the_seeds_after_it(client: openai.OpenAI, base: Base, stream: bool) -> None:
    found: Any = client.chat.completions.create(
        model="tiny", messages=[user("w5")], n=3, seed=11, max_tokens=12, stream=stream, stop=["nothing like it"],
    )  # type: ignore[call-overload]  # fmt: skip
    if stream:
        said = ["", "", ""]
        for chunk in found:
            said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        said = [choice.message.content for choice in found.choices]
    assert said == [words(base, expected(base, [user("w5")], Settings(1.0, 1.0, seed, 12))) for seed in (11, 12, 13)]


def test_without_a_seed_answers_are_drawn_anew(client: openai.OpenAI) -> None:
    said = {client.chat.completions.create(model="tiny", messages=[user("w5")], max_tokens=12).choices[0].message.content for _ in range(3)}  # type: ignore[list-item]
    assert len(said) == 3


def test_a_stop_string(client: openai.OpenAI, base: Base) -> None:
    whole = words(base, expected(base, [user("w5")], Settings(1.0, 1.0, 4, 20)))
    stop = " ".join(whole.split()[6:8])
    found: Any = client.chat.completions.create(model="tiny", messages=[user("w5")], seed=4, max_tokens=20, stop=stop)  # type: ignore[list-item]
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].message.content == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_logprobs(client: openai.OpenAI, base: Base, stream: bool) -> None:
    found: Any = client.chat.completions.create(
        model="tiny", messages=[user("w5")], temperature=0, max_tokens=6, logprobs=True, top_logprobs=2, stream=stream,
    )  # type: ignore[call-overload]  # fmt: skip
    content = list(found)[-1].choices[0].logprobs.content if stream else found.choices[0].logprobs.content
    assert [base.tokenizer.convert_tokens_to_ids(each.token) for each in content] == expected(base, [user("w5")], Settings(max_tokens=6))
    for each in content:
        assert each.token == each.top_logprobs[0].token  # greedy takes the likeliest
        assert each.logprob == each.top_logprobs[0].logprob >= each.top_logprobs[1].logprob
        assert bytes(each.bytes).decode() == each.token


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="w5", temperature=0, max_tokens=4, logprobs=1).choices[0]
    assert found.logprobs is not None
    assert len(found.logprobs.tokens or ()) == 4
    assert found.logprobs.text_offset is not None
    placed = zip(found.logprobs.text_offset, found.logprobs.tokens or (), strict=True)
    assert all(found.text[start:].strip().startswith(token) for start, token in placed if not token.startswith("<"))  # special tokens add no text


def test_what_was_read_in_an_earlier_turn_is_kept(client: openai.OpenAI) -> None:
    asked = [user("w31 w32 w33")]
    for text in ("w34", "w35"):
        found = client.chat.completions.create(model="tiny", messages=asked, max_tokens=8, temperature=0)  # type: ignore[arg-type]
        asked += [assistant(found.choices[0].message.content or ""), user(text)]
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 5 + 8 - 1  # <s>, three words, <s>, and the answer but its last token


BODY = {"model": "tiny", "messages": [user("w5")], "max_tokens": 2}


@pytest.mark.parametrize(
    ("changes", "status", "param", "code", "said"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found", "the model must be 'tiny', got 'gpt-4'"),
        ({"model": "x" * 100_000}, 404, "model", "model_not_found", "x" * 100 + "…"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter", "must be of type text"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter", "not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter", "not supported"),
        ({"temperature": 9}, 400, None, None, "temperature must be 0 or between 1e-06 and 5, got 9.0"),
        ({"temperature": float("nan")}, 400, None, None, "temperature must be a finite number"),
        ({"temperature": 10**400}, 400, None, None, "temperature must be a finite number"),
        ({"temperature": "hot"}, 400, "temperature", None, "temperature must be a number, got 'hot'"),
        ({"max_tokens": 0}, 400, None, None, "max_tokens must be between 1 and 4096, got 0"),
        ({"max_tokens": True}, 400, "max_tokens", None, "max_tokens must be a whole number, got True"),
        ({"n": 9}, 400, "n", None, "n must be between 1 and 8, got 9"),
        ({"stop": [1]}, 400, "stop", None, "stop must be a text or a list of texts"),
        ({"messages": []}, 400, None, None, "at least one message"),
        ({"messages": "w5"}, 400, "messages", None, "messages must be a list"),
        ({"messages": [{"role": "tool", "content": "w5"}]}, 400, None, None, "must be one of system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "w5"}]}, 400, None, None, "must be one of system, user, assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]", "unsupported_parameter", "must be of type text"),
        ({"messages": [user("w5 \ud83d")]}, 400, None, None, "half of a surrogate pair at character 4"),
        ({"messages": [user("w5 " * 600)]}, 400, "messages", "context_length_exceeded", "less than 512 tokens"),
        ({"top_logprobs": 2}, 400, "top_logprobs", None, "needs logprobs"),
        ({"logprobs": True, "max_tokens": 513}, 400, None, None, "at most 512 with logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_is_refused(
    address: str, changes: dict[str, Any], status: int, param: str | None, code: str | None, said: str, stream: bool
) -> None:
    body = json.dumps(BODY | changes | {"stream": stream})
    found = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert found.status_code == status
    error = found.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]


def test_openais_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="less than 512 tokens") as refused:
        client.chat.completions.create(model="tiny", messages=[user("w5 " * 600)])  # type: ignore[list-item]
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="w5 " * 600)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=[user("w5")])  # type: ignore[list-item]
    assert unknown.value.code == "model_not_found"


def test_what_changes_nothing_is_taken(address: str) -> None:
    harmless = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0, "seed": -5,
        "user": "me", "store": False, "unheard_of": {"of": 1}, "messages": [{"role": "developer", "content": [{"type": "text", "text": "w4"}]}, user("w5")],
    }  # fmt: skip
    assert httpx.post(f"{address}/v1/chat/completions", json=BODY | harmless).status_code == 200


def test_bodies_that_are_none(address: str) -> None:
    url, kind = f"{address}/v1/chat/completions", {"content-type": "application/json"}
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"[]"):
        found = httpx.post(url, content=content, headers=kind)
        assert found.status_code == 400
        assert found.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(url, content=json.dumps(BODY), headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, content=b" " * (MOST_BYTES + 1), headers=kind).status_code == 413


def test_elsewhere(address: str) -> None:
    for found, status in ((httpx.get(f"{address}/v1/chat/completions"), 405), (httpx.get(f"{address}/v1/nothing"), 404)):
        assert found.status_code == status
        assert "message" in found.json()["error"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert model.model_extra["lossless"]["context"] == 512  # type: ignore[index]
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="the model must be 'tiny', got 'org/other'"):
        client.models.retrieve("org/other")


def test_a_key(engine: Engine) -> None:
    with served(build(engine, key="se\u00e9cret")) as address:
        for given in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic secret"}, {"authorization": "Bearer"}):
            for path in ("/v1/models", "/metrics"):
                found = httpx.get(f"{address}{path}", headers=given)
                assert found.status_code == 401
                assert found.json()["error"]["code"] == "invalid_api_key"
            assert httpx.post(f"{address}/v1/chat/completions", json=BODY, headers=given).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
    with served(build(engine, key="secret")) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
        assert client.models.list().data
        assert client.chat.completions.create(**BODY).choices  # type: ignore[call-overload]


def test_metrics(base: Base) -> None:
    engine = engine_over(base)
    with served(build(engine)) as address:
        httpx.post(f"{address}/v1/chat/completions", json=BODY | {"max_tokens": 7})
        found = dict(line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if not line.startswith("#"))
    labels = '{ending="length",way="accelerated"}'
    assert float(found[f"lossless_answers_total{labels}"]) == 1
    assert float(found[f"lossless_tokens_total{labels}"]) == 7
    assert float(found["lossless_waiting"]) == 0
    assert float(found["lossless_kept_bytes"]) == engine.kept_bytes > 0
    assert math.isnan(float(found["lossless_plain_tokens_per_second"]))
    engine.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_away_frees_the_slot(engine: Engine, address: str, in_background: Callable[..., list[Any]], stream: bool) -> None:
    hold = Hold()
    in_background(engine.answer([user("w5")], Settings(max_tokens=2), cancelled=hold))
    assert hold.reached.wait(20)
    answered = engine.totals().copy()
    body = BODY | {"max_tokens": 400, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as link:
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        link.sendall(head.encode() + content)
        until(lambda: engine.waiting == 2)
    until(lambda: engine.waiting == 1)  # it waited, and is out of the line before its turn has come
    hold.released.set()
    until(lambda: engine.waiting == 0)
    begun = {key: total.answers - (answered[key].answers if key in answered else 0) for key, total in engine.totals().items()}
    assert sum(begun.values()) == 1


def test_a_client_that_goes_away_before_it_has_asked(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("uvicorn.error")  # which hands nothing on
    with served(build(engine)) as address, socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as link:
        log.addHandler(caplog.handler)
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert httpx.get(f"{address}/health").status_code == 200
        link.close()
    log.removeHandler(caplog.handler)
    assert not caplog.text  # it is no defect


def test_a_client_that_goes_away_midway(base: Base, address: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, generate = Hold(), engine.fast.generate  # type: ignore[union-attr]

    def slow(*given: Any, **named: Any) -> Any:
        named["stopping_criteria"].append(lambda ids, scores, **_: torch.tensor([ids.shape[1] > 20 and hold()]))
        return generate(*given, **named)

    monkeypatch.setattr(engine.fast, "generate", slow)
    before = engine.totals().get(("accelerated", "cancelled"))
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=BODY | {"max_tokens": 400, "stream": True}) as found:
        lines = found.iter_lines()
        assert next(lines).startswith("data: ")
        assert hold.reached.wait(20)
    monkeypatch.undo()
    # the server notices while the model is at a step, and the slot is free at the next one
    time.sleep(1.0)
    hold.released.set()
    until(lambda: engine.waiting == 0)
    after = engine.totals()["accelerated", "cancelled"]
    assert after.answers == (before.answers if before else 0) + 1
    assert after.tokens - (before.tokens if before else 0) < 60


def test_a_long_prompt_holds_nobody_up(engine: Engine, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, reached, released = engine.answer, threading.Event(), threading.Event()

    def slow(*given: Any, **named: Any) -> Any:  # as if its tokens took a while to count
        reached.set()
        assert released.wait(20)
        return answer(*given, **named)

    monkeypatch.setattr(engine, "answer", slow)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=60).status_code))
    asking.start()
    try:
        assert reached.wait(20)
        assert httpx.get(f"{address}/health").status_code == 200
    finally:
        released.set()
        asking.join(60)
    assert found == [200]


def test_a_failing_model(engine: Engine, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device fell off")

    with monkeypatch.context() as patch:
        patch.setattr(engine.fast, "generate", broken)
        found = httpx.post(f"{address}/v1/chat/completions", json=BODY)
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "the answer could not be finished: the device fell off"
        streamed = httpx.post(f"{address}/v1/chat/completions", json=BODY | {"stream": True})
        assert '"type": "server_error"' in streamed.text.split("\n\n")[-2]
    assert httpx.post(f"{address}/v1/chat/completions", json=BODY).status_code == 200


def test_twenty_messages_at_once(address: str, base: Base) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"model": "tiny", "messages": [user(f"w{5 + number} w6")], "max_tokens": 16, "temperature": number % 2, "seed": number, "stream": number % 3 == 0}
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            said: Any = client.chat.completions.create(**body)  # type: ignore[call-overload]
            if body["stream"]:
                found[number] = "".join(chunk.choices[0].delta.content or "" for chunk in said)
            else:
                found[number] = said.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    wanted = {n: words(base, expected(base, [user(f"w{5 + n} w6")], Settings(float(n % 2), 1.0, n, 16))) for n in range(20)}
    assert found == wanted


def test_four_programs_whose_conversations_grow(base: Base) -> None:
    engine = engine_over(base, kept_bytes=60_000)  # of 512 bytes a row: not all of what they say
    found: dict[int, list[tuple[str, int]]] = {number: [] for number in range(4)}
    held: list[int] = []

    def opening(number: int, turn: int) -> dict[str, str]:
        return user(f"w{5 + 7 * number} w{10 + turn}")

    def talk(number: int) -> None:
        messages = list[dict[str, str]]()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            for turn in range(5):
                messages.append(opening(number, turn))
                how: Any = {"temperature": float(number % 2), "seed": turn, "max_tokens": 12}
                said = client.chat.completions.create(model="tiny", messages=messages, **how)  # type: ignore[arg-type]
                held.append(engine.kept_bytes)
                text = said.choices[0].message.content or ""
                found[number].append((text, said.usage.prompt_tokens_details.cached_tokens))  # type: ignore[union-attr, arg-type]
                messages.append(assistant(text))

    with served(build(engine)) as address:
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for number, said in found.items():
        messages = list[dict[str, str]]()
        for turn, (text, _) in enumerate(said):
            messages.append(opening(number, turn))
            assert text == words(base, expected(base, messages, Settings(float(number % 2), 1.0, turn, 12)))
            messages.append(assistant(text))
    assert len(held) == 20
    assert 0 < max(held) <= 60_000
    assert any(cached > 10 for said in found.values() for _, cached in said)  # rows of an earlier turn, and not of a template's beginning
    engine.close()


def test_the_demo_model(demo: Base) -> None:
    fast = accelerate(demo.model, shipped_adapter("demo") or "", demo.tokenizer)
    engine = Engine(demo.model, demo.tokenizer, fast, Info("demo", "shipped", context=8192))
    messages = [{"role": "system", "content": "You are brief."}, user("Count from one to ten in words.")]
    with served(build(engine)) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        for temperature in (0.0, 0.8):
            found = client.chat.completions.create(model="demo", messages=messages, max_tokens=32, temperature=temperature, seed=1)  # type: ignore[arg-type]
            tokens = expected(demo, messages, Settings(temperature, 1.0, 1, 32))
            assert found.choices[0].message.content == words(demo, tokens)
            assert found.model_extra["lossless"]["accelerated"] is True  # type: ignore[index]
    engine.close()
