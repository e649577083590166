"""What a row becomes, whatever its format: a conversation of messages; and how messages are read."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.data_file import parse_json
from lora_cli.errors import shown

Row = Mapping[str, Any]
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates and data give to it


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds what only the chat template reads, such as tool calls and reasoning."""

    role: str
    content: str
    trained: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """One row. `templated` rows go through the chat template; the others are joined as they stand."""

    messages: Sequence[Message]
    templated: bool
    tools: Sequence[Any] | None = None
    number: int = 0  # of its line or row in the file
    group: str | None = None  # what `data.split_by` keeps on one side


class RowError(Exception):
    """What is wrong with one row; the caller knows where it stands."""


def keys_of(row: Row) -> str:
    """Return the keys of a row as messages show them."""
    return shown(", ".join(map(str, row))) or "nothing"


def text_of(row: Row, key: str, *, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(f'"{key}" must be text, found {type(value).__name__}')
    return _whole(value)


def _whole(text: str) -> str:
    """Return a text that is valid Unicode: JSON can hold half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"holds half of a character (position {error.start}); write the whole one") from None
    return text


def _require_whole_within(value: Any) -> None:
    """Raise RowError where any text inside a value is no valid Unicode."""
    if isinstance(value, str):
        _whole(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _require_whole_within(key)
            _require_whole_within(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_whole_within(inner)


# --- messages ---

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant",
          "observation": "tool", "function": "tool"}  # fmt: skip
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer", "ipython")


def _message(entry: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(entry, dict):
        raise RowError(f"each message must be an object, found {type(entry).__name__}")
    if role_key not in entry:
        raise RowError(f'a message has no "{role_key}" (it has {keys_of(entry)})')
    role = text_of(entry, role_key)
    known = (role_key, content_key, "weight", "train")
    extra = {k: v for k, v in entry.items() if k not in known and v is not None}
    _require_whole_within(extra)
    content = entry.get(content_key)
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(text_of(part, "text") for part in content)
    if role == "function_call":  # ShareGPT's: the content is the call
        extra["tool_calls"], content = _called(content), None
    elif "function_call" in extra:  # the older form of OpenAI's
        extra["tool_calls"] = [{"type": "function", "function": extra.pop("function_call")}]
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"])
    for name in _REASONING:
        if name in extra and not isinstance(extra[name], str):
            raise RowError(f'"{name}" of a {shown(role, 40)} message must be text, found {type(extra[name]).__name__}')
    if content is None and extra:
        content = ""
    if not isinstance(content, str):
        raise RowError(f'"{content_key}" of a {shown(role, 40)} message must be text, found {type(content).__name__}')
    role = _role(role)
    return Message(role, _whole(content), _is_trained(entry, role), extra)


def _role(name: str) -> str:
    """Return a role by the name templates know it under. Raises RowError for one that is almost a known role."""
    role = _ROLES.get(name, name)
    known = (*_KNOWN_ROLES, *_ROLES)
    if role not in known and (close := difflib.get_close_matches(role.lower(), known, n=1, cutoff=0.75)):
        raise RowError(f'has a message of the role "{shown(name, 40)}"; did you mean "{close[0]}"?')
    return role


def _called(content: Any) -> list[Any]:
    """Return the calls that a function_call message holds as JSON: one, or a list."""
    try:
        calls = parse_json(content) if isinstance(content, str) else content
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError('has a function_call message that is no call as JSON ({"name": ..., "arguments": ...})')
    return [{"type": "function", "function": call} for call in calls]


def _is_trained(entry: Row, role: str) -> bool:
    """Return whether a message is trained: an answer, unless it says `weight: 0` or `train: false`."""
    weight, train = entry.get("weight"), entry.get("train")
    if weight not in (None, 0, 1):
        raise RowError(f'"weight" of a message must be 0 or 1, found {shown(weight)}')
    if train is not None and not isinstance(train, bool):
        raise RowError(f'"train" of a message must be true or false, found {shown(train)}')
    if role != "assistant":
        if train:
            raise RowError(f'"train: true" on a {shown(role, 40)} message: only answers can be trained')
        return False
    return weight != 0 and train is not False


def _tool_calls(calls: Any) -> list[Any]:
    """Return tool calls with their arguments as objects: templates would write arguments that are text as a string."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError('"tool_calls" must be a list of objects')
    return [
        {**call, "function": _with_arguments(call["function"])} if "function" in call else _with_arguments(call)
        for call in calls
    ]


def _with_arguments(function: Any) -> Any:
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = parse_json(function["arguments"] or "{}")
    except ValueError as error:
        raise RowError(f'"arguments" of a tool call is text that is not JSON: {shown(error)}') from None
    return {**function, "arguments": arguments}


def parse_messages(entries: Any, role_key: str = "role", content_key: str = "content") -> Sequence[Message]:
    """Return the messages of a list, whatever they are. Raises RowError."""
    if not isinstance(entries, list) or not entries:
        raise RowError(f'has no messages: a list of {{"{role_key}", "{content_key}"}} is expected')
    return tuple(_message(entry, role_key, content_key) for entry in entries)


def parse_conversation(entries: Any, row: Row, role_key: str = "role", content_key: str = "content") -> Conversation:
    messages = parse_messages(entries, role_key, content_key)
    if not any(m.role == "assistant" for m in messages):
        raise RowError("has no answer: no message of the role assistant")
    if not any(m.trained for m in messages):
        raise RowError("has no answer that is trained: each has weight 0 or train false")
    if any(m.trained and not (m.content.strip() or m.extra.get("tool_calls") or reasoning(m)) for m in messages):
        raise RowError("has an empty answer; leave the row out")
    return Conversation(_with_system(messages, row), True, parse_tools(row.get("tools")))


def _with_system(messages: Sequence[Message], row: Row) -> Sequence[Message]:
    """Return messages behind the system message that stands in a row's "system", where there is one."""
    system = text_of(row, "system", default="")
    if not system:
        return messages
    if messages[0].role == "system":
        raise RowError('has a system message twice: in "system" and among its messages')
    return (Message("system", system, False), *messages)


def parse_tools(value: Any) -> Sequence[Any] | None:
    """Return the tools of a row: a list, or a list written as JSON text; nothing where it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError(f'"tools" is text that is not JSON: {shown(error)}') from None
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f'"tools" must be a list, found {type(value).__name__}')
    _require_whole_within(value)
    return value


def name_of(tool: Any) -> str:
    """Return the name of a tool, or of a call of one; "" where it has none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return str(function.get("name", "")) if isinstance(function, dict) else ""


# --- reasoning ---


def thinks(message: Message) -> bool:
    """Return whether an answer shows its reasoning, in a field of its own or inside its content."""
    return any(message.extra.get(name) for name in _REASONING) or "</think>" in message.content


def reasoning_and_answer(message: Message) -> tuple[str, str]:
    """Return the reasoning of a message and the rest of its content, wherever the reasoning stands."""
    inside, found, rest = message.content.rpartition("</think>")
    inside = inside.rpartition("<think>")[2]
    return (reasoning(message) or inside).strip("\n"), (rest if found else message.content).lstrip("\n")


def reasoning(message: Message) -> str:
    """Return the reasoning that a message carries in a field of its own."""
    return next((str(message.extra[name]) for name in _REASONING if message.extra.get(name)), "")
