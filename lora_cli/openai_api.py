"""Requests and replies in the shapes of OpenAI's API (platform.openai.com/docs/api-reference), as plain values.

What is not supported is refused, never left out silently: an answer is as it was asked for, or there is none.
"""

import difflib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.chat_reports import Said
from lora_cli.conversation import Message, RowError, parse_messages
from lora_cli.data_file import parse_json
from lora_cli.errors import shown
from lora_cli.generate import Sampling
from lora_cli.speaker import USUAL, Manner

MOST_STOPS = 4
_READ = ("model", "stream", "stream_options", "temperature", "top_p", "top_k", "max_tokens", "stop", "seed")
_NOTES = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")  # change no answer
# What is understood only with the value that asks for nothing.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class BadRequest(Exception):
    """What is wrong with a request; `param` is the key, where one is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Request:
    """What is asked for: the answer to messages, or the continuation of a text."""

    model: str
    asked: Sequence[Message] | str
    manner: Manner
    stream: bool
    with_usage: bool  # a last chunk of a stream that counts tokens

    @property
    def is_chat(self) -> bool:
        """Whether messages are to be answered."""
        return not isinstance(self.asked, str)


def parse(body: bytes, chat: bool) -> Request:
    """Read a request's body. Raises BadRequest."""
    try:
        values = parse_json(body.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is no JSON: {shown(error, 120)}.") from None
    if not isinstance(values, dict):
        raise BadRequest(f"The body must be a JSON object, found {type(values).__name__}.")
    values = {key: value for key, value in values.items() if value is not None}
    _require_supported(values, chat)
    stream = _value(values, "stream", bool, False)
    options = _value(values, "stream_options", dict, {})
    if options and (not stream or set(options) - {"include_usage"}):
        raise BadRequest("stream_options: takes include_usage alone, and only where stream is true.", "stream_options")
    return Request(
        model=_value(values, "model", str),
        asked=_messages(values) if chat else _prompt(values),
        manner=_manner(values),
        stream=stream,
        with_usage=_value(options, "include_usage", bool, False),
    )


def _require_supported(values: Mapping[str, Any], chat: bool) -> None:
    """Raise BadRequest for a key that nothing here reads."""
    asked = ("messages", "max_completion_tokens") if chat else ("prompt",)
    for key, value in values.items():
        if key in _NEUTRAL:
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in _NEUTRAL[key]):
                only = " or ".join(map(repr, _NEUTRAL[key]))
                raise BadRequest(f"{key}: is not supported here; leave it out, or give {only}.", key)
        elif key not in (*_READ, *_NOTES, *asked):
            close = difflib.get_close_matches(key, (*_READ, *asked), n=1)
            hint = f'; did you mean "{close[0]}"?' if close else "; leave it out."
            raise BadRequest(f"{shown(key, 40)}: is not supported here{hint}", shown(key, 40))


_REQUIRED: Any = object()


def _value(values: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Return a value of a type. Raises BadRequest."""
    value = values.get(key, default)
    if value is _REQUIRED:
        raise BadRequest(f"{key}: is missing.", key)
    numbers = kind is float and isinstance(value, int)
    if (isinstance(value, bool) and kind is not bool) or not (isinstance(value, kind) or numbers):
        raise BadRequest(f"{key}: must be {_NAMES[kind]}, found {shown(value, 40)}.", key)
    return value


_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}


def _number(
    values: Mapping[str, Any], key: str, default: Any, is_good: Callable[[Any], bool], expected: str, kind: type = float
) -> Any:
    value = _value(values, key, kind, default) if key in values else default
    if key in values and not is_good(value):
        raise BadRequest(f"{key}: must be {expected}, found {shown(value, 40)}.", key)
    return value


def _manner(values: Mapping[str, Any]) -> Manner:
    """Return how to answer; without a seed another answer is drawn each time."""
    limits = [key for key in ("max_tokens", "max_completion_tokens") if key in values]
    if len(limits) > 1:
        raise BadRequest("max_tokens, max_completion_tokens: give one of them.", limits[0])
    length = limits[0] if limits else "max_tokens"
    sampling = Sampling(
        temperature=_number(values, "temperature", USUAL.temperature, lambda n: 0 <= n <= 2, "from 0 to 2"),
        top_p=_number(values, "top_p", USUAL.top_p, lambda n: 0 < n <= 1, "above 0 and at most 1"),
        top_k=_number(values, "top_k", USUAL.top_k, lambda n: n >= 0, "0 or more", int),
        seed=_number(values, "seed", secrets.randbits(62), lambda n: abs(n) < 1 << 63, "of 64 bits", int),
    )
    most = _number(values, length, None, lambda n: n >= 1, "1 or more", int)
    return Manner(sampling, most, stops=_stops(values))


def _stops(values: Mapping[str, Any]) -> Sequence[str]:
    stop = values.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise BadRequest(f"stop: must be text or a list of texts, found {shown(stop, 40)}.", "stop")
    if len(stops) > MOST_STOPS:
        raise BadRequest(f"stop: has {len(stops)} texts; at most {MOST_STOPS} are taken.", "stop")
    return stops


def _messages(values: Mapping[str, Any]) -> Sequence[Message]:
    try:
        messages = parse_messages(values.get("messages"))
    except RowError as error:
        raise BadRequest(f"messages: {error}.", "messages") from None
    if messages[-1].role not in ("user", "tool"):
        raise BadRequest(
            f"messages: the last one must be of the role user or tool, found {shown(messages[-1].role, 40)}.",
            "messages",
        )
    return messages


def _prompt(values: Mapping[str, Any]) -> str:
    prompt = values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("prompt: must be one text; tokens and several prompts are not supported here.", "prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadRequest("prompt: holds half of a character; write the whole one.", "prompt") from None
    return prompt


# --- replies ---


class Reply:
    """Writes one request's reply, whole or in chunks."""

    def __init__(self, request: Request, created: int) -> None:
        self._request = request
        chat = request.is_chat
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": created, "model": request.model}
        self._kind = kind
        self._chat = chat

    def whole(self, said: Said) -> dict[str, Any]:
        """Return the answer at once."""
        content = {"message": {"role": "assistant", "content": said.text}} if self._chat else {"text": said.text}
        return {**self._head, "object": self._kind, "choices": [self._choice(content, said)], "usage": _usage(said)}

    def first(self) -> dict[str, Any] | None:
        """Return the chunk that opens a stream; a text's has none."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """Return a chunk of the answer."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text})

    def last(self, said: Said) -> list[dict[str, Any]]:
        """Return the chunks that end a stream."""
        end = self._chunk({"delta": {}} if self._chat else {"text": ""}, said)
        if not self._request.with_usage:
            return [end]
        return [end, {**end, "choices": [], "usage": _usage(said)}]

    def _chunk(self, content: Mapping[str, Any], said: Said | None = None) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": [self._choice(content, said)]}

    def _choice(self, content: Mapping[str, Any], said: Said | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": said.finish_reason if said else None}


def _usage(said: Said) -> dict[str, Any]:
    return {
        "prompt_tokens": said.prompt_tokens,
        "completion_tokens": said.tokens,
        "total_tokens": said.prompt_tokens + said.tokens,
        "prompt_tokens_details": {"cached_tokens": said.reused_tokens},
    }


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as clients of the API read it."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the list of models."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> dict[str, Any]:
    """Return one model of the list."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lora"}
