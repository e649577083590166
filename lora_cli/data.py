"""Rows -> Conversation, one function per row format; every wrong row is named before anything is trained."""

import difflib
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_cli.conversation import Conversation, Message, Row, RowError, keys_of, parse_conversation, text_of
from lora_cli.data_config import HELD_OUT, DataConfig, HeldOut, SourceConfig
from lora_cli.data_file import Block, Broken, DataFile
from lora_cli.errors import NOTHING_LOADED, DataError, shown
from lora_cli.sources import find_files, is_hub_id, is_plain_text, read_plain_text

# --- formats ---


def _from_messages(row: Row) -> Conversation:
    return parse_conversation(row["messages"], row)


def _from_sharegpt(row: Row) -> Conversation:
    return parse_conversation(row["conversations"], row, "from", "value")


def _from_alpaca(row: Row) -> Conversation:
    question = "\n\n".join(
        part for part in (text_of(row, "instruction"), text_of(row, "input", default="")) if part.strip()
    )
    answer = text_of(row, "output")
    if not answer.strip():
        raise RowError('has an empty answer ("output"); leave the row out')
    system = text_of(row, "system", default="")
    messages = [Message("system", system, False)] if system else []
    return Conversation((*messages, Message("user", question, False), Message("assistant", answer, True)), True)


def _from_prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = parse_conversation([*prompt, *completion], row)
        given = len(asked.messages) - len(completion)  # the prompt, and a system message of the row's own
        answers = tuple(replace(m, trained=m.trained and i >= given) for i, m in enumerate(asked.messages))
        if not any(message.trained for message in answers):
            raise RowError('has no answer in "completion"; leave the row out')
        return replace(asked, messages=answers)
    if row.get("system") or row.get("tools"):
        raise RowError('has "system" or "tools", which have no place in a plain prompt; use format: messages')
    prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
    if not completion.strip():
        raise RowError('has an empty answer ("completion"); leave the row out')
    return Conversation((Message("prompt", prompt, False), Message("completion", completion, True)), False)


def _from_text(row: Row) -> Conversation:
    text = text_of(row, "text")
    if not text.strip():
        raise RowError('has an empty "text"; leave the row out')
    return Conversation((Message("text", text, True),), False)


_FORMATS: dict[str, tuple[Sequence[str], Callable[[Row], Conversation]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "prompt-completion": (("prompt", "completion"), _from_prompt_completion),
    "text": (("text",), _from_text),
}
_OPTIONAL = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt-completion": ("system", "tools"),
    "text": (),
}
TEMPLATED = ("messages", "sharegpt", "alpaca")  # always; prompt-completion where both are lists of messages


def _read_by(format: str) -> frozenset[str]:
    return frozenset((*_FORMATS[format][0], *_OPTIONAL[format]))


def detect_format(row: Row, named: frozenset[str] = frozenset()) -> str | None:
    """Return the first format whose keys the row has, and that reads the `named` keys; preference for pairs."""
    fitting = [name for name in _FORMATS if named <= _read_by(name)]
    found = next((name for name in fitting if all(key in row for key in _FORMATS[name][0])), None)
    return found or ("preference" if {"chosen", "rejected"} <= row.keys() else None)


def _explain_keys(row: Row, wanted: str | None) -> str:
    keys = _FORMATS[wanted][0] if wanted else [key for keys, _ in _FORMATS.values() for key in keys]
    missing = [key for key in keys if key not in row]
    guesses = [
        f'"{shown(close[0])}" looks like "{key}"'
        for key in missing
        if (close := difflib.get_close_matches(key, list(map(str, row)), n=1))
    ]
    if wanted:
        expected = f"{wanted} needs {' and '.join(keys)}"
    else:
        expected = "expected " + ", or ".join(" and ".join(keys) for keys, _ in _FORMATS.values())
        expected += ", or data.fields to say which columns these are"
    return f"has the keys {keys_of(row)}; {expected}" + (f" ({', '.join(guesses)})" if guesses else "")


# --- rows ---


@dataclass(frozen=True)
class Reader:
    """How the rows of one file become conversations."""

    file: DataFile
    format: str | None  # None: as the first row of the file
    fields: Mapping[str, str]
    prompt_template: str | None
    group_field: str | None
    unread: Sequence[str] = ()  # columns of the first row that nothing reads

    @property
    def named(self) -> frozenset[str]:
        """The keys that the config fills: a format that does not read them is not meant."""
        return frozenset(self.fields) | (frozenset({"prompt"}) if self.prompt_template else frozenset())

    def convert(self, row: Any, number: int) -> Conversation:
        """Return one row as a conversation. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError(f"must be an object with keys, found {type(row).__name__}")
        renamed = self.renamed(row)
        format = self.format or detect_format(renamed, self.named)
        if format not in _FORMATS or any(key not in renamed for key in _FORMATS[format][0]):
            raise RowError(_explain_keys(renamed, format if format in _FORMATS else None))
        conversation = _FORMATS[format][1](renamed)
        group = None
        if self.group_field is not None:
            if row.get(self.group_field) is None:
                raise RowError(f'has no "{self.group_field}", which data.split_by needs')
            group = str(row[self.group_field])
        return replace(conversation, number=number, group=group)

    def renamed(self, row: Row) -> Row:
        """Return a row with the columns that `fields` names, and the prompt that `prompt_template` makes."""
        if missing := [name for name in self.fields.values() if name not in row]:
            raise RowError(f'has no column "{missing[0]}", which data.fields names{_nearest(missing[0], row)}')
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


def _nearest(name: str, row: Row) -> str:
    """Return what a row has in place of a column that it has not."""
    close = difflib.get_close_matches(name, list(map(str, row)), n=1)
    return f'; did you mean "{shown(close[0])}"?' if close else f" (it has {keys_of(row)})"


def _fill(template: str, row: Row) -> str:
    """Return a prompt template with the row's columns in it."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            if row.get(name) is None or row[name] != row[name]:  # a table has NaN where it has nothing
                raise RowError(f'has no "{name}", which data.prompt_template names{_nearest(name, row)}')
            if isinstance(row[name], dict | list):
                raise RowError(f'"{name}" must be text for data.prompt_template, found {type(row[name]).__name__}')
            parts.append(str(row[name]))
    if not any(str(row[name]).strip() for _, name, _, _ in string.Formatter().parse(template) if name is not None):
        raise RowError("has nothing in the columns that data.prompt_template names")
    return "".join(parts)


def readers(source: SourceConfig, group_field: str | None = None) -> list[Reader]:
    """Return how each file of a source is read; its format is that of its first row where none is named.

    Raises DataError, SurroundingsError.
    """
    found = []
    for file in find_files(source.path, source.subset, source.split):
        format = source.format if source.format not in (None, "auto") else None
        reader = Reader(file, format, source.fields or {}, source.prompt_template, group_field)
        first = _first_row(reader)
        reader = replace(reader, format=format or detect_format(first, reader.named))
        if reader.format in _FORMATS and (unread := sorted(reader.named - _read_by(reader.format))):
            setting = "data.fields" if unread[0] in reader.fields else "data.prompt_template"
            raise DataError(
                f"{setting}: makes {unread[0]!r}, which rows of the format {reader.format} have not ({file.name}).",
                state=NOTHING_LOADED,
            )
        if reader.format == "preference":
            raise DataError(
                f"{file.name}: holds preference pairs (chosen, rejected), on which plain training cannot be done; to "
                "train on the chosen answers alone, set data.format: prompt-completion and data.fields: {completion: "
                "chosen}.",
                state=NOTHING_LOADED,
            )
        found.append(replace(reader, unread=_unread(first, reader)))
    return found


def _rows_of(file: DataFile) -> Iterator[Row]:
    return (row for block in file.blocks() for _, row in block.rows() if isinstance(row, dict))


def _first_row(reader: Reader) -> Row:
    """Return the first row that is one, with its columns renamed; empty where there is none."""
    try:
        return reader.renamed(next(_rows_of(reader.file), {}))
    except RowError:  # it is reported with its place when the file is read
        return {}


def _unread(row: Row, reader: Reader) -> list[str]:
    """Return the columns of a row that nothing reads; one that is spelt almost like a key says so."""
    if reader.format not in _FORMATS:
        return []
    template = string.Formatter().parse(reader.prompt_template or "")
    read = {*_FORMATS[reader.format][0], *_OPTIONAL[reader.format], reader.group_field, *(part[1] for part in template)}
    missing = [key for key in _OPTIONAL[reader.format] if key not in row]
    unread = [name for name in map(str, row) if name not in read]
    close = [difflib.get_close_matches(name, missing, n=1, cutoff=0.8) for name in unread]
    return [f'{n} (did you mean "{found[0]}"?)' if found else n for n, found in zip(unread, close, strict=True)]


def first_row(source: str) -> Row:
    """Return the first row of a source, as it stands there. Raises DataError, SurroundingsError."""
    return next((row for file in find_files(source) for row in _rows_of(file)), {})


def held_out_source(config: DataConfig, name: HeldOut) -> SourceConfig | None:
    """Return the source that `data.validation` or `data.test` names: a file, or a split of the hub data set."""
    held_out = getattr(config, name)
    if not isinstance(held_out, str):
        return None
    if len(config.sources) == 1 and is_hub_id(held_out) and is_hub_id(config.sources[0].path):
        return config.sources[0].model_copy(update={"split": held_out})
    return config.source(SourceConfig(path=held_out))


def general_source(path: str | None) -> SourceConfig | None:
    """Return the source of general text that stands in rows; its format is found by its content."""
    return SourceConfig(path=path, format="auto") if path else None


def replay_source(config: DataConfig) -> SourceConfig | None:
    """Return the source that `data.replay` names; its format is found by its content."""
    return general_source(config.replay.path) if config.replay else None


LOOKED_AT = 8 << 20  # bytes of every file, or
ROWS_LOOKED_AT = 20_000  # rows of it, that are read before anything slow begins


def require_readable(config: DataConfig, general: str | None = None) -> None:
    """Read the beginning of every file, so that a wrong one is known at once, before the model's tokenizer is.

    `general` names one more: general text, plain or in rows.

    Raises DataError with all wrong rows found there, SurroundingsError.
    """
    problems: list[str] = []
    found = [reader for source in config.sources for reader in readers(source, config.group_field)]
    if general is not None and is_plain_text(general):
        read_plain_text(Path(general).expanduser())
        general = None
    others = (*(held_out_source(config, name) for name in HELD_OUT), replay_source(config), general_source(general))
    for reader in (*found, *(reader for source in others if source for reader in readers(source))):
        size = rows = 0
        for block in reader.file.blocks():
            problems += reader.read(block)[1]
            size += block.size
            rows += len(block.items)
            if size >= LOOKED_AT or rows >= ROWS_LOOKED_AT:
                break
        if not rows:
            problems.append(f"{reader.file.name}: has no rows to read; write a row a line.")
    if problems:
        raise DataError(*problems, state=NOTHING_LOADED)
