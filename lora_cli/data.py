"""Rows -> Conversation, one function per row format; every wrong row is named before anything is trained."""

import difflib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.config import DataConfig, SourceConfig
from lora_cli.errors import NOTHING_LOADED, DataError
from lora_cli.sources import Block, Broken, DataFile, find_files, is_hub_id

Row = Mapping[str, Any]


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


def _text(row: Row, key: str, *, default: str | None = None) -> str:
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
        raise RowError(f"holds half of a character (position {error.start})") from None
    return text


def _whole_within(value: Any) -> None:
    """Raise RowError where any text inside a value is no valid Unicode."""
    if isinstance(value, str):
        _whole(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _whole_within(key)
            _whole_within(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _whole_within(inner)


# --- messages ---

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant",
          "observation": "tool", "function": "tool"}  # fmt: skip


def _message(entry: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(entry, dict):
        raise RowError(f"each message must be an object, found {type(entry).__name__}")
    if role_key not in entry:
        raise RowError(f'a message has no "{role_key}" (it has {", ".join(map(str, entry)) or "nothing"})')
    role = _text(entry, role_key)
    known = (role_key, content_key, "weight", "train")
    extra = {k: v for k, v in entry.items() if k not in known and v is not None}
    _whole_within(extra)
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"])
    content = entry.get(content_key)
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and extra:
        content = ""
    if not isinstance(content, str):
        raise RowError(f'"{content_key}" of a {role} message must be text, found {type(content).__name__}')
    role = _ROLES.get(role, role)
    return Message(role, _whole(content), _is_trained(entry, role), extra)


def _is_trained(entry: Row, role: str) -> bool:
    """Return whether a message is trained: an answer, unless it says `weight: 0` or `train: false`."""
    weight, train = entry.get("weight"), entry.get("train")
    if weight not in (None, 0, 1):
        raise RowError(f'"weight" of a message must be 0 or 1, found {weight!r}')
    if train not in (None, True, False):
        raise RowError(f'"train" of a message must be true or false, found {train!r}')
    if role != "assistant":
        if train:
            raise RowError(f'"train: true" on a {role} message: only answers can be trained')
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
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        raise RowError('"arguments" of a tool call is text that is not JSON') from None
    return {**function, "arguments": arguments}


def _conversation(entries: Any, row: Row, role_key: str = "role", content_key: str = "content") -> Conversation:
    if not isinstance(entries, list) or not entries:
        raise RowError("has no messages")
    messages = tuple(_message(entry, role_key, content_key) for entry in entries)
    if not any(m.role == "assistant" for m in messages):
        raise RowError("has no answer: no message of the role assistant")
    if not any(m.trained for m in messages):
        raise RowError("has no answer that is trained: each has weight 0 or train false")
    if any(m.trained and not m.content.strip() and not m.extra for m in messages):
        raise RowError("has an empty answer")
    return Conversation(messages, True, _tools(row.get("tools")))


def _tools(value: Any) -> Sequence[Any] | None:
    """Return the tools of a row: a list, or a list written as JSON text; nothing where it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError('"tools" is text that is not JSON') from None
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f'"tools" must be a list, found {type(value).__name__}')
    _whole_within(value)
    return value


# --- formats ---


def _from_messages(row: Row) -> Conversation:
    return _conversation(row["messages"], row)


def _from_sharegpt(row: Row) -> Conversation:
    entries = row["conversations"]
    if isinstance(row.get("system"), str) and row["system"] and isinstance(entries, list):
        entries = [{"from": "system", "value": row["system"]}, *entries]
    return _conversation(entries, row, "from", "value")


def _from_alpaca(row: Row) -> Conversation:
    question = "\n\n".join(
        part for part in (_text(row, "instruction"), _text(row, "input", default="")) if part.strip()
    )
    answer = _text(row, "output")
    if not answer.strip():
        raise RowError('has an empty answer ("output")')
    system = _text(row, "system", default="")
    messages = [Message("system", system, False)] if system else []
    return Conversation((*messages, Message("user", question, False), Message("assistant", answer, True)), True)


def _from_prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _conversation([*prompt, *completion], row)
        answers = tuple(replace(m, trained=m.trained and i >= len(prompt)) for i, m in enumerate(asked.messages))
        if not any(message.trained for message in answers):
            raise RowError('has no answer in "completion"')
        return replace(asked, messages=answers)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion.strip():
        raise RowError('has an empty answer ("completion")')
    return Conversation((Message("prompt", prompt, False), Message("completion", completion, True)), False)


def _from_text(row: Row) -> Conversation:
    text = _text(row, "text")
    if not text.strip():
        raise RowError('has an empty "text"')
    return Conversation((Message("text", text, True),), False)


_FORMATS: dict[str, tuple[Sequence[str], Callable[[Row], Conversation]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "prompt-completion": (("prompt", "completion"), _from_prompt_completion),
    "text": (("text",), _from_text),
}
TEMPLATED = ("messages", "sharegpt", "alpaca")  # always; prompt-completion where both are lists of messages


def detect_format(row: Row) -> str | None:
    """Return the first format whose keys the row has; preference for pairs of answers."""
    found = next((name for name, (keys, _) in _FORMATS.items() if all(key in row for key in keys)), None)
    return found or ("preference" if {"chosen", "rejected"} <= row.keys() else None)


def _explain_keys(row: Row, wanted: str | None) -> str:
    has = ", ".join(map(str, row)) or "nothing"
    keys = _FORMATS[wanted][0] if wanted else [key for keys, _ in _FORMATS.values() for key in keys]
    missing = [key for key in keys if key not in row]
    guesses = [
        f'"{close[0]}" looks like "{key}"'
        for key in missing
        if (close := difflib.get_close_matches(key, list(map(str, row)), n=1))
    ]
    if wanted:
        expected = f"{wanted} needs {' and '.join(keys)}"
    else:
        expected = "expected " + ", or ".join(" and ".join(keys) for keys, _ in _FORMATS.values())
        expected += ", or data.fields to say which columns these are"
    return f"has the keys {has}; {expected}" + (f" ({', '.join(guesses)})" if guesses else "")


# --- rows ---


@dataclass(frozen=True)
class Reader:
    """How the rows of one file become conversations."""

    file: DataFile
    format: str | None  # None: as the first row of the file
    fields: Mapping[str, str]
    prompt_template: str | None
    group_field: str | None

    def convert(self, row: Any, number: int) -> Conversation:
        """Return one row as a conversation. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError(f"must be an object with keys, found {type(row).__name__}")
        renamed = self._renamed(row)
        format = self.format or detect_format(renamed)
        if format is None or any(key not in renamed for key in _FORMATS[format][0]):
            raise RowError(_explain_keys(renamed, format))
        conversation = _FORMATS[format][1](renamed)
        group = None
        if self.group_field is not None:
            if row.get(self.group_field) is None:
                raise RowError(f'has no "{self.group_field}", which data.split_by needs')
            group = str(row[self.group_field])
        return replace(conversation, number=number, group=group)

    def _renamed(self, row: Row) -> Row:
        """Return a row with the columns that `fields` names, and the prompt that `prompt_template` makes."""
        if missing := [name for name in self.fields.values() if name not in row]:
            close = difflib.get_close_matches(missing[0], list(map(str, row)), n=1)
            hint = f'; did you mean "{close[0]}"?' if close else f" (it has {', '.join(map(str, row))})"
            raise RowError(f'has no column "{missing[0]}", which data.fields names{hint}')
        taken = set(self.fields.values())
        renamed = {k: v for k, v in row.items() if k not in taken} | {k: row[v] for k, v in self.fields.items()}
        if self.prompt_template is not None:
            renamed["prompt"] = _fill(self.prompt_template, row)
        return renamed

    def read(self, block: Block) -> tuple[list[Conversation], list[str]]:
        """Return the conversations of a block, and what is wrong with its other rows."""
        conversations, problems = [], []
        for number, row in block.rows():
            if isinstance(row, Broken):
                problems.append(f"{self.file.place(number)}{row.problem}")
                continue
            try:
                conversations.append(self.convert(row, number))
            except RowError as error:
                problems.append(f"{self.file.place(number)}: this row {error}.")
        return conversations, problems


def _fill(template: str, row: Row) -> str:
    """Return a prompt template with the row's columns in it."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            if row.get(name) is None:
                raise RowError(f'has no "{name}", which data.prompt_template names')
            if isinstance(row[name], dict | list):
                raise RowError(f'"{name}" must be text for data.prompt_template, found {type(row[name]).__name__}')
            parts.append(str(row[name]))
    return "".join(parts)


def readers(source: SourceConfig, group_field: str | None = None) -> list[Reader]:
    """Return how each file of a source is read; its format is that of its first row where none is named.

    Raises DataError, SurroundingsError.
    """
    found = []
    for file in find_files(source.path, source.subset, source.split):
        format = source.format if source.format not in (None, "auto") else None
        reader = Reader(file, format, source.fields or {}, source.prompt_template, group_field)
        if format is None:
            reader = replace(reader, format=_format_of_first_row(reader))
        if reader.format == "preference":
            raise DataError(
                f"{file.name}: holds preference pairs (chosen, rejected), on which plain training cannot be done; to "
                "train on the chosen answers alone, set data.format: prompt-completion and data.fields: {completion: "
                "chosen}.",
                state=NOTHING_LOADED,
            )
        found.append(reader)
    return found


def _format_of_first_row(reader: Reader) -> str | None:
    rows = (row for block in reader.file.blocks() for _, row in block.rows() if isinstance(row, dict))
    try:
        return detect_format(reader._renamed(next(rows, {})))
    except RowError:  # it is reported with its place when the file is read
        return None


def held_out_source(config: DataConfig) -> SourceConfig | None:
    """Return the source that `data.validation` names: a file, or a split of the hub data set trained on."""
    held_out = config.validation
    if not isinstance(held_out, str):
        return None
    if len(config.sources) == 1 and is_hub_id(held_out) and is_hub_id(config.sources[0].path):
        return config.sources[0].model_copy(update={"split": held_out})
    return config.source(SourceConfig(path=held_out))


def replay_source(config: DataConfig) -> SourceConfig | None:
    """Return the source that `data.replay` names; its format is found by its content."""
    return SourceConfig(path=config.replay.path, format="auto") if config.replay else None


LOOKED_AT = 8 << 20  # bytes of every file, or
ROWS_LOOKED_AT = 20_000  # rows of it, that are read before anything slow begins


def require_readable(config: DataConfig) -> None:
    """Read the beginning of every file, so that a wrong one is known at once, before the model's tokenizer is.

    Raises DataError with all wrong rows found there, SurroundingsError.
    """
    problems: list[str] = []
    found = [reader for source in config.sources for reader in readers(source, config.group_field)]
    others = (held_out_source(config), replay_source(config))
    for reader in (*found, *(reader for source in others if source for reader in readers(source))):
        size = rows = 0
        for block in reader.file.blocks():
            problems += reader.read(block)[1]
            size += block.size
            rows += len(block.items)
            if size >= LOOKED_AT or rows >= ROWS_LOOKED_AT:
                break
        if not rows:
            problems.append(f"{reader.file.name}: has no rows.")
    if problems:
        raise DataError(*problems, state=NOTHING_LOADED)
