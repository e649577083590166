"""Rows -> Conversation, one function per row format; every wrong row is named before anything is trained."""

import difflib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.config import DataConfig
from lora_cli.errors import NOTHING_LOADED, DataError
from lora_cli.randomness import derive_seed
from lora_cli.sources import Broken, is_hub_id, iter_rows

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds what only the chat template reads, such as tool calls."""

    role: str
    content: str
    trained: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """One row. `templated` rows go through the chat template; the others are joined as they stand."""

    messages: Sequence[Message]
    templated: bool
    where: str
    tools: Sequence[Any] | None = None


class _RowError(Exception):
    """What is wrong with one row; the caller knows where it stands."""


def _text(row: Row, key: str, *, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise _RowError(f'"{key}" must be text, found {type(value).__name__}')
    return _whole(value)


def _whole(text: str) -> str:
    """Return a text that is valid Unicode: JSON can hold half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _RowError(f"holds half of a character (position {error.start})") from None
    return text


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant",
          "observation": "tool", "function": "tool"}  # fmt: skip


def _message(entry: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(entry, dict):
        raise _RowError(f"each message must be an object, found {type(entry).__name__}")
    if role_key not in entry:
        raise _RowError(f'a message has no "{role_key}" (it has {", ".join(map(str, entry)) or "nothing"})')
    role = _text(entry, role_key)
    extra = {k: v for k, v in entry.items() if k not in (role_key, content_key) and v is not None}
    content = entry.get(content_key)
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and extra:
        content = ""
    if not isinstance(content, str):
        raise _RowError(f'"{content_key}" of a {role} message must be text, found {type(content).__name__}')
    role = _ROLES.get(role, role)
    return Message(role, _whole(content), role == "assistant", extra)


def _conversation(
    entries: Any, where: str, row: Row, role_key: str = "role", content_key: str = "content"
) -> Conversation:
    if not isinstance(entries, list) or not entries:
        raise _RowError("has no messages")
    messages = tuple(_message(entry, role_key, content_key) for entry in entries)
    if not any(m.trained for m in messages):
        raise _RowError("has no answer: no message of the role assistant")
    if any(m.trained and not m.content.strip() and not m.extra for m in messages):
        raise _RowError("has an empty answer")
    return Conversation(messages, True, where, _tools(row.get("tools")))


def _tools(value: Any) -> Sequence[Any] | None:
    """Return the tools of a row: a list, or a list written as JSON text; nothing where it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise _RowError('"tools" is text that is not JSON') from None
    if not value:
        return None
    if not isinstance(value, list):
        raise _RowError(f'"tools" must be a list, found {type(value).__name__}')
    return value


def _from_messages(row: Row, where: str) -> Conversation:
    return _conversation(row["messages"], where, row)


def _from_sharegpt(row: Row, where: str) -> Conversation:
    entries = row["conversations"]
    if isinstance(row.get("system"), str) and row["system"] and isinstance(entries, list):
        entries = [{"from": "system", "value": row["system"]}, *entries]
    return _conversation(entries, where, row, "from", "value")


def _from_alpaca(row: Row, where: str) -> Conversation:
    question = "\n\n".join(
        part for part in (_text(row, "instruction"), _text(row, "input", default="")) if part.strip()
    )
    answer = _text(row, "output")
    if not answer.strip():
        raise _RowError('has an empty answer ("output")')
    system = _text(row, "system", default="")
    messages = [Message("system", system, False)] if system else []
    return Conversation((*messages, Message("user", question, False), Message("assistant", answer, True)), True, where)


def _from_prompt_completion(row: Row, where: str) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _conversation([*prompt, *completion], where, row)
        answers = tuple(
            Message(m.role, m.content, m.trained and i >= len(prompt), m.extra) for i, m in enumerate(asked.messages)
        )
        if not any(message.trained for message in answers):
            raise _RowError('has no answer in "completion"')
        return Conversation(answers, True, where, asked.tools)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion.strip():
        raise _RowError('has an empty answer ("completion")')
    return Conversation((Message("prompt", prompt, False), Message("completion", completion, True)), False, where)


def _from_text(row: Row, where: str) -> Conversation:
    text = _text(row, "text")
    if not text.strip():
        raise _RowError('has an empty "text"')
    return Conversation((Message("text", text, True),), False, where)


_FORMATS: dict[str, tuple[Sequence[str], Callable[[Row, str], Conversation]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "prompt-completion": (("prompt", "completion"), _from_prompt_completion),
    "text": (("text",), _from_text),
}


def detect_format(row: Row) -> str | None:
    """Return the first format whose keys the row has."""
    return next((name for name, (keys, _) in _FORMATS.items() if all(key in row for key in keys)), None)


def _explain_keys(row: Row, wanted: str) -> str:
    has = ", ".join(map(str, row)) or "nothing"
    if {"chosen", "rejected"} <= row.keys():
        return "is a preference pair (chosen, rejected), which plain training cannot use"
    keys = _FORMATS[wanted][0] if wanted in _FORMATS else [key for keys, _ in _FORMATS.values() for key in keys]
    missing = [key for key in keys if key not in row]
    guesses = [
        f'"{close[0]}" looks like "{key}"'
        for key in missing
        if (close := difflib.get_close_matches(key, list(map(str, row)), n=1))
    ]
    if wanted in _FORMATS:
        expected = f"{wanted} needs {' and '.join(keys)}"
    else:
        expected = "expected " + ", or ".join(" and ".join(keys) for keys, _ in _FORMATS.values())
    return f"has the keys {has}; {expected}" + (f" ({', '.join(guesses)})" if guesses else "")


def read(source: str, format: str = "auto", split: str = "train") -> list[Conversation]:
    """Read every row of a source. Raises DataError with all wrong rows, each with its place."""
    conversations: list[Conversation] = []
    problems: list[str] = []
    chosen = None if format == "auto" else format
    for where, row in iter_rows(source, split):
        if isinstance(row, Broken):
            problems.append(row.problem)
            continue
        if not isinstance(row, dict):
            problems.append(f"{where}: a row must be an object with keys, found {type(row).__name__}.")
            continue
        chosen = chosen or detect_format(row)
        if chosen is None or any(key not in row for key in _FORMATS[chosen][0]):
            problems.append(f"{where}: this row {_explain_keys(row, chosen or 'auto')}.")
            continue
        try:
            conversations.append(_FORMATS[chosen][1](row, where))
        except _RowError as error:
            problems.append(f"{where}: this row {error}.")
    if problems:
        raise DataError(*problems, state=NOTHING_LOADED)
    if not conversations:
        raise DataError(f"{source}: has no rows.", state=NOTHING_LOADED)
    return conversations


def read_split(config: DataConfig, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training and the validation rows; the same rows for the same data and seed. Raises DataError."""
    held_out = config.validation
    if isinstance(config.train, str):
        train = read(config.train, config.format)
    else:
        sources = [(source.path, source.format) for source in config.train]
        train = [row for path, kind in sources for row in read(path, kind if kind != "auto" else config.format)]
    if isinstance(held_out, str):
        if isinstance(config.train, str) and is_hub_id(held_out) and is_hub_id(config.train):
            return train, read(config.train, config.format, split=held_out)
        return train, read(held_out, config.format)
    count = held_out if isinstance(held_out, int) else round(held_out * len(train))
    if held_out == 0:
        return train, []
    if not 0 < count < len(train):
        raise DataError(
            f"data.validation: {held_out} of {len(train)} rows leaves {len(train) - count} to train on and {count} to "
            "validate on; both need at least one. Give a number of rows, a file of its own, or 0 for none.",
            state=NOTHING_LOADED,
        )
    order = list(range(len(train)))
    random.Random(derive_seed(seed, "validation split")).shuffle(order)
    chosen = set(order[:count])
    return (
        [row for index, row in enumerate(train) if index not in chosen],
        [row for index, row in enumerate(train) if index in chosen],
    )
