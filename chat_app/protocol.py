"""OpenAI's requests and replies as plain data.

Knows: which fields there are, what they mean here, and which are refused because an answer without them would be another one. Does
not know: HTTP, or how answers are made. Fields that nobody knows are ignored, as OpenAI's own clients expect.
"""

from __future__ import annotations

import math
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossless.errors import UsageError

from .answer import Answer, Info
from .engine import MOST_LOGPROBS, MOST_TOKENS_WITH_LOGPROBS, Busy
from .settings import MOST_TOKENS, Asked, Settings, TooLong

MOST_CHOICES = 8
_MOST_SAID = 500  # characters of a refusal, which may repeat what was sent
_COMPLETION_TOKENS = 16  # OpenAI's default for texts that are gone on with
_REFUSED = (
    "tools", "tool_choice", "functions", "function_call", "logit_bias", "frequency_penalty", "presence_penalty", "audio", "suffix",
    "echo", "web_search_options",
)  # fmt: skip


class Refusal(Exception):
    """A request that is not answered; `body` is what OpenAI's clients read."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        message = message if len(message) <= _MOST_SAID else f"{message[:_MOST_SAID]}…"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: UsageError, chat: bool = True) -> Refusal:
    """What a client is told of bad input."""
    if isinstance(error, TooLong):
        return Refusal(str(error), code="context_length_exceeded", param="messages" if chat else "prompt")
    if isinstance(error, Busy):
        return Refusal(str(error), 429, "rate_limit_error", code="too_many_requests")
    return Refusal(str(error))


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        messages: a conversation, or the text of a completion.
        settings: of the first choice; the others have the seeds after it.
        choices: so many answers.
        logprobs: as in `Engine.answer`.
        include_usage: a stream ends with a chunk that counts tokens.
    """

    chat: bool
    messages: Asked
    settings: Settings
    choices: int = 1
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False


def require_served(name: Any, info: Info) -> None:
    """Raises Refusal for another model than the one that is here."""
    if name != info.name:
        raise Refusal(f"the model must be {info.name!r}, got {name!r}", 404, param="model", code="model_not_found")


def described(info: Info) -> dict[str, Any]:
    """The model as the list of models has it."""
    about = {"adapter": info.adapter, "precision": info.precision, "device": info.device, "threads": info.threads,
             "exact": info.exact, "context": info.context, "packed": info.packed}  # fmt: skip
    return {"id": info.name, "object": "model", "created": 0, "owned_by": "lossless", "lossless": about}


def parse(body: Any, chat: bool, info: Info) -> Request:
    """Raises Refusal for what cannot be answered as it was meant."""
    if not isinstance(body, dict):
        raise Refusal("the body must be a JSON object")
    _of_type(body, "model", str, None)
    require_served(body.get("model"), info)
    for name in _REFUSED:
        if body.get(name) and body[name] != "none":
            raise Refusal(f"{name} is not supported", param=name, code="unsupported_parameter")
    if (form := body.get("response_format")) is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise Refusal("response_format must be of type text", param="response_format", code="unsupported_parameter")
    if (kinds := body.get("modalities")) is not None and kinds != ["text"]:
        raise Refusal("modalities must be text only", param="modalities", code="unsupported_parameter")
    choices = _of_type(body, "n", int, 1)
    if not 1 <= choices <= MOST_CHOICES:
        raise Refusal(f"n must be between 1 and {MOST_CHOICES}, got {choices}", param="n")
    if _of_type(body, "best_of", int, choices) != choices:
        raise Refusal("best_of must be n", param="best_of", code="unsupported_parameter")
    logprobs = _chat_logprobs(body) if chat else _of_type(body, "logprobs", int, None)
    options = _of_type(body, "stream_options", dict, {})
    settings = _settings(body, _longest(chat, info, logprobs))
    messages = _messages(_of_type(body, "messages", list, [])) if chat else _prompt(body.get("prompt"))
    stream = _of_type(body, "stream", bool, False)
    return Request(chat, messages, settings, choices, logprobs, stream, bool(options.get("include_usage")))


def _of_type(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field's value; null is as good as nothing."""
    value = body.get(name)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else math.inf  # which nothing may be, as nothing may be so large
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        named = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list", dict: "an object"}[kind]
        raise Refusal(f"{name} must be {named}, got {value!r}"[:300], param=name)
    return value


def _longest(chat: bool, info: Info, logprobs: int | None) -> int:
    """Tokens of an answer if the request does not say."""
    if not chat:
        return _COMPLETION_TOKENS
    return min(MOST_TOKENS if logprobs is None else MOST_TOKENS_WITH_LOGPROBS, info.context)


def _settings(body: dict[str, Any], longest: int) -> Settings:
    stop = body.get("stop")
    if not (stop is None or isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(each, str) for each in stop))):
        raise Refusal("stop must be a text or a list of texts", param="stop")
    seed = _of_type(body, "seed", int, None)
    try:
        return Settings(
            temperature=_of_type(body, "temperature", float, 1.0),
            top_p=_of_type(body, "top_p", float, 1.0),
            seed=secrets.randbelow(2**31) if seed is None else seed % 2**62,  # OpenAI's may be negative
            max_tokens=_of_type(body, "max_completion_tokens", int, _of_type(body, "max_tokens", int, longest)),
            stop=tuple([stop] if isinstance(stop, str) else stop or ()),
        )
    except UsageError as error:
        raise refusal(error) from error


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    most = _of_type(body, "top_logprobs", int, 0)
    if not _of_type(body, "logprobs", bool, False):
        if most:
            raise Refusal("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    if not 0 <= most <= MOST_LOGPROBS:
        raise Refusal(f"top_logprobs must be between 0 and {MOST_LOGPROBS}, got {most}", param="top_logprobs")
    return int(most)


def _messages(found: list[Any]) -> list[dict[str, Any]]:
    """Role and text of each message; parts of a text are joined. The engine says which roles may come when."""
    messages = []
    for place, message in enumerate(found):
        name = f"messages[{place}]"
        if not isinstance(message, dict):
            raise Refusal(f"{name} must be an object", param=name)
        role = "system" if message.get("role") == "developer" else message.get("role")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
                raise Refusal(f"the parts of {name} must be of type text", param=name, code="unsupported_parameter")
            content = "".join(part["text"] for part in content)
        if message.get("tool_calls"):
            raise Refusal("tool_calls is not supported", param=name, code="unsupported_parameter")
        messages.append({"role": role, "content": content})
    return messages


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Refusal("prompt must be a text", param="prompt")
    return prompt


@dataclass
class Reply:
    """What is sent, whole or in chunks.

    Args:
        decode: of one token's id.
    """

    request: Request
    model: str
    decode: Callable[[int], str]
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.request.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All choices at once."""
        choices = []
        for index, answer in enumerate(answers):
            said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}} if self.request.chat else {"text": answer.text}
            choices.append({"index": index, **said, "logprobs": self._logprobs(answer), "finish_reason": answer.ending})
        kind = "chat.completion" if self.request.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage(answers), "lossless": figures(answers)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat: who speaks."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})

    def growth(self, index: int, text: str, ended: Answer | None = None) -> dict[str, Any]:
        """A chunk: more of a choice's text; with the whole answer once it has ended."""
        said: dict[str, Any] = {"delta": {"content": text} if text or ended is None else {}} if self.request.chat else {"text": text}
        logprobs = None if ended is None else self._logprobs(ended)
        return self._chunk({"index": index, **said, "logprobs": logprobs, "finish_reason": None if ended is None else ended.ending})

    def counts(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk behind the last one, for those who want to know the usage."""
        return self._head(self._chunks) | {"choices": [], "usage": usage(answers)}

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self.request.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head(self._chunks) | {"choices": [choice]} | ({"usage": None} if self.request.include_usage else {})

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        if self.request.chat:
            return {"content": [self._token(token, known) | {"top_logprobs": [self._token(*one) for one in best]}
                                for token, (known, best) in zip(answer.tokens, answer.logprobs, strict=True)]}  # fmt: skip
        starts = [sum(map(len, answer.pieces[:place])) for place in range(len(answer.tokens))]
        return {
            "tokens": [self.decode(token) for token in answer.tokens],
            "token_logprobs": [known for known, _ in answer.logprobs],
            "top_logprobs": [{self.decode(token): value for token, value in best} for _, best in answer.logprobs],
            "text_offset": starts,
        }

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = self.decode(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # a part of a character has no text of its own
        return {"token": text, "logprob": value, "bytes": list(text.encode()) if whole else None}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens, counted as OpenAI does: the prompt once."""
    read, given = answers[0].prompt_tokens, sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": given, "total_tokens": read + given,
            "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens}}  # fmt: skip


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """How the answers came about, of all choices together: tokens per pass, and per second behind each first token."""
    passes = sum(answer.target_passes for answer in answers)
    later = sum(len(answer.tokens) - len(answer.steps[0].tokens) for answer in answers if answer.steps)
    seconds = sum(answer.seconds - (answer.first_s or 0.0) for answer in answers)
    return {
        "accelerated": all(answer.way == "accelerated" and answer.served for answer in answers),
        "exact": answers[0].exact,
        "acceptance_length": later / passes if passes else None,
        "target_passes": passes,
        "tokens_per_s": later / seconds if seconds > 0 else None,
        "first_s": answers[0].first_s,
    }
