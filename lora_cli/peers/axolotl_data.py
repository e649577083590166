"""Axolotl's data sets, chat templates, lengths and held-out rows: what they are here.

Keys and defaults: axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas/datasets.py and config.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Rule, Source, Taken, Unsaid, is_off, reason_for
from lora_cli.peers.axolotl_keys import ROW_FIXED, ROW_NOT_NEEDED, ROW_OTHER_TRAINING
from lora_cli.peers.rows import (
    Place,
    chat_template,
    message_fields,
    message_format,
    place_of_split,
    place_of_subset,
    renamed,
    share,
)
from lora_cli.sources import is_hub_id

_LOADERS = ("json", "csv", "parquet")  # a path that only says how data_files are read
_TEMPLATES = {"chatml": "chatml", "alpaca": "alpaca"}
_ROLES = {"system": {"system"}, "user": {"user", "human"}, "assistant": {"assistant", "gpt", "model"}, "tool": {"tool"}}
# What the keys that are read may hold.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("path", "split", "name", "field", "field_messages", "field_tools"), str),
    **dict.fromkeys(("message_field_role", "message_field_content"), str),
    "type": (str, dict),
    "data_files": (str, list),
    "message_property_mappings": dict,
}
MESSAGE_KEYS = ("field_messages", "message_property_mappings", "message_field_role", "message_field_content")


def holds_out(source: Source) -> bool:
    """Return whether rows are held out."""
    return bool(source.number("val_set_size")) or not is_off(source.get("test_datasets"))


def _entries(source: Source) -> list[Mapping[str, Any]]:
    listed = source.get("datasets", [])
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _datasets(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of each key of each training set."""
    entries = _entries(source)
    alone = len(entries) == 1 and not entries[0].get("name") and entries[0].get("split") in (None, "train")
    for index, entry in enumerate(entries):
        yield from _entry(entry, f"datasets[{index}].", Place(None if alone else index))
    if not entries:
        why = "no data set could be read from the file; name yours"
        yield Unsaid("data.train", "train.jsonl", why)


def _entry(entry: Mapping[str, Any], at: str, place: Place) -> Iterator[Outcome]:
    """Iterate over what becomes of each key of one training set."""
    given = {key: value for key, value in entry.items() if not is_off(value)}
    readable = {key: value for key, value in given.items() if isinstance(value, _KINDS.get(key, object))}
    found = [*_path(readable, at, place), *_rows(readable, at, place)]
    yield from found
    done = {getattr(outcome, "key", "").removeprefix(at) for outcome in found}
    for key, value in entry.items():
        if key in done:
            continue
        if is_off(value):
            yield NotNeeded(at + key, value, "says nothing")
        elif key in _KINDS:
            yield NotPossible(at + key, value, "is not what their program takes here", True)
        elif key in ROW_FIXED:
            yield ROW_FIXED[key].outcome(at + key, value)
        elif key == "chat_template":
            yield from chat_template(at + key, value, _TEMPLATES)
        elif key == "roles":
            yield _roles(at + key, value)
        elif why := reason_for(key, ROW_NOT_NEEDED):
            yield NotNeeded(at + key, value, why)
        else:
            unknown = "is not known here; see whether it changes what is trained"
            yield NotPossible(at + key, value, reason_for(key, ROW_OTHER_TRAINING) or unknown, True)


def _path(entry: Mapping[str, Any], at: str, place: Place) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that say where the rows are."""
    path, files = str(entry.get("path", "")), entry.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    joined = [str(file) if path in _LOADERS else f"{path}/{file}" for file in files]
    place_path = joined[0] if joined else path
    if path:
        yield Taken(f"{at}path", path, place.key("path"), place_path)
    else:
        yield Unsaid(place.key("path"), place_path or "train.jsonl", "no path is said there; put yours here")
    if joined and (len(joined) > 1 or (path not in _LOADERS and is_hub_id(path))):
        why = f"name each file as a source of its own under data.train; {place_path} is written"
        yield NotPossible(f"{at}data_files", entry["data_files"], why, True)
    elif joined:
        yield Taken(f"{at}data_files", entry["data_files"], place.key("path"), place_path)
    if split := entry.get("split"):
        yield place_of_split(f"{at}split", split, place_path, place)
    if name := entry.get("name"):
        yield place_of_subset(f"{at}name", name, place_path, place)


def _rows(entry: Mapping[str, Any], at: str, place: Place) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that say how rows are read."""
    kind = entry.get("type")
    family = str(kind).split(".")[0].split(":")[0]
    match family:
        case _ if isinstance(kind, dict):
            yield from _own_prompt(kind, f"{at}type", place)
        case "alpaca":
            differs = "its headings come from data.chat_template: alpaca, without Alpaca's opening sentence"
            yield Taken(f"{at}type", kind, place.key("format"), "alpaca", differs)
        case "completion":
            differs = "a text that is too long is cut into several there, here data.too_long decides"
            yield Taken(f"{at}type", kind, place.key("format"), "text", differs)
            if fields := renamed({"text": entry.get("field")}):
                yield Taken(f"{at}field", entry["field"], place.key("fields"), fields)
        case "chat_template" | "sharegpt":
            yield from _messages(entry, at, place, family)
        case _ if kind is not None:
            why = "data.format is left at auto, by the keys of the rows; where that fails, name one (docs/data.md)"
            yield NotPossible(f"{at}type", kind, why, True)
    unread = [key for key in ("field", *MESSAGE_KEYS) if entry.get(key) is not None]
    if family not in ("chat_template", "sharegpt"):
        unread = [key for key in unread if not (key == "field" and family == "completion" and entry["field"] != "text")]
        yield from (NotNeeded(at + key, entry[key], f"type {family} does not read it") for key in unread)


def _messages(entry: Mapping[str, Any], at: str, place: Place, family: str) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys of rows that hold messages."""
    usual = ("conversations", "from", "value") if family == "sharegpt" else ("messages", "role", "content")
    names = entry.get("message_property_mappings") or {}
    role = str(names.get("role") or entry.get("message_field_role") or usual[1])
    content = str(names.get("content") or entry.get("message_field_content") or usual[2])
    format = message_format(role, content)
    others = {key for key, name in names.items() if key not in ("role", "content") and key != name}
    if format is None or others:
        why = "messages are {role, content} or {from, value} here: rename the keys in the rows"
        for key in ("type", *MESSAGE_KEYS):
            if entry.get(key) is not None:
                yield NotPossible(at + key, entry[key], why, True)
        return
    columns = message_fields(format, entry.get("field_messages") or usual[0])
    fields = renamed({**columns, "tools": entry.get("field_tools")})
    for key in ("type", "message_property_mappings", "message_field_role", "message_field_content"):
        if entry.get(key) is not None:
            yield Taken(at + key, entry[key], place.key("format"), format)
    for key in ("field_messages", "field_tools"):
        if entry.get(key) is not None and fields:
            yield Taken(at + key, entry[key], place.key("fields"), fields)
        elif entry.get(key) is not None:
            yield Taken(at + key, entry[key], place.key("format"), format)
    if fields and entry.get("field_messages") is None and entry.get("field_tools") is None:
        yield Unsaid(place.key("fields"), fields, "their default of field_messages")
    if entry.get("field") is not None:
        yield NotNeeded(f"{at}field", entry["field"], f"type {family} does not read it")


def _own_prompt(kind: Mapping[str, Any], key: str, place: Place) -> Iterator[Outcome]:
    """Iterate over what becomes of a prompt that the config writes itself; here it is made out of columns."""
    written = str(kind.get("no_input_format") or kind.get("format") or "")
    column, answer = kind.get("field_instruction") or "instruction", kind.get("field_output") or "output"
    others = [name for name in ("field_input", "field_system", "system_prompt") if kind.get(name)]
    if others or "{instruction}" not in written or "{input}" in written:
        why = "write data.prompt_template with {column} for each column, and data.fields: {completion: ...}"
        yield NotPossible(key, dict(kind), why, True)
        return
    template = written.replace("{instruction}", f"{{{column}}}")
    yield Taken(key, dict(kind), place.key("prompt_template"), template, "the answer follows it as it stands")
    yield Unsaid(place.key("fields"), renamed({"completion": str(answer)}), "field_output of the prompt")


def _roles(key: str, value: Any) -> Outcome:
    """Return what becomes of roles by other names."""
    listed = value.items() if isinstance(value, dict) else ()
    if listed and all(set(names) <= _ROLES.get(role, set()) for role, names in listed if isinstance(names, list)):
        return NotNeeded(key, value, "these roles are known")
    return NotPossible(key, value, "call the roles system, user, assistant and tool in the rows", True)


def _template(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the chat template of the whole config."""
    kinds = {str(entry.get("type")).split(".")[0].split(":")[0] for entry in _entries(source)}
    name, jinja = source.get("chat_template"), source.get("chat_template_jinja")
    if kinds == {"alpaca"}:
        yield Unsaid("data.chat_template", "alpaca", "type: alpaca writes that prompt, whatever the model's template")
        for one in source.given("chat_template", "chat_template_jinja"):
            yield NotNeeded(*one, "type: alpaca does not use it")
        return
    if jinja and "{" in str(jinja):
        yield NotPossible("chat_template_jinja", jinja, "write it into a file, and name that: data.chat_template", True)
    elif jinja:
        yield Taken("chat_template_jinja", jinja, "data.chat_template", jinja)
    if name == "jinja":
        yield NotNeeded("chat_template", name, "chat_template_jinja says which")
    elif name is not None and str(name).startswith("tokenizer_default"):
        yield Taken("chat_template", name, "data.chat_template", None)
    elif name is not None:
        yield from chat_template("chat_template", name, _TEMPLATES)


def _lengths(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the longest row, and of rows that are longer."""
    length, policy = source.number("sequence_len"), source.get("excess_length_strategy")
    yield (
        Taken("sequence_len", length, "data.max_length", length)
        if length
        else Unsaid("data.max_length", 512, "their default of sequence_len")
    )
    if policy is None:
        yield Unsaid("data.too_long", "drop", "their default: a longer row is left out; `lora check` says how many")
    else:
        yield Taken("excess_length_strategy", policy, "data.too_long", "error" if policy == "raise" else policy)


def _held_out(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the rows that are held out."""
    tests, size = source.get("test_datasets"), source.number("val_set_size")
    if isinstance(tests, list) and tests:
        path = str(tests[0].get("path")) if isinstance(tests[0], dict) and len(tests) == 1 else ""
        if path and not is_hub_id(path) and not tests[0].get("data_files"):
            yield Taken("test_datasets", tests, "data.validation", path, "read as data.train is")
        else:
            yield NotPossible(
                "test_datasets", tests, "data.validation is one file, a share, a number or a split", False
            )
            yield Unsaid("data.validation", 0, "what is held out there could not be taken over")
        if size is not None:
            yield NotNeeded("val_set_size", size, "test_datasets decide there")
    elif size is None:
        yield Unsaid("data.validation", 0, "nothing is held out there; a share would let the best adapter be chosen")
    else:
        yield Taken("val_set_size", size, "data.validation", share(size), "rows with the same prompt stay on one side")


RULES = (
    Rule(("datasets",), ("data.train", "data.format", "data.fields", "data.prompt_template"), _datasets),
    Rule(("chat_template", "chat_template_jinja"), ("data.chat_template",), _template),
    Rule(("sequence_len", "excess_length_strategy"), ("data.max_length", "data.too_long"), _lengths),
    Rule(("test_datasets", "val_set_size"), ("data.validation",), _held_out),
)
