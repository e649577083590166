"""YAML <-> RunConfig: all problems at once, each with its place and a way out; `a.b=value` overrides."""

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_cli.config import RunConfig
from lora_cli.config_checks import check_config
from lora_cli.errors import NOTHING_READ, ConfigError, SurroundingsError, shown
from lora_cli.other_names import OTHER_NAMES
from lora_cli.records import plain
from lora_cli.schema import Section
from lora_cli.strict_yaml import Document, Key, parse, read_value, require_no_secret
from lora_cli.strict_yaml import dump as dump_yaml

MAX_BYTES = 200_000


def _override(document: Document, overrides: Sequence[str]) -> Document:
    """Apply `a.b=value` overrides to a document's values."""
    values, places = dict(document.values), dict(document.places)
    if isinstance(values.get("model"), str):
        values["model"] = {"path": values["model"]}
        places[("model", "path")] = places[("model",)]
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            problems.append(f'override "{shown(override)}": expected KEY=VALUE, for example lora.rank=8.')
            continue
        section = values
        for part in parts[:-1]:
            inner = section.get(part)
            section[part] = dict(inner) if isinstance(inner, dict) else {}
            section = section[part]
        section[parts[-1]] = read_value(text, f"override {shown(key)}")
        places = {at: place for at, place in places.items() if at[: len(parts)] != tuple(parts)}
        for length in range(1, len(parts) + 1):
            places.setdefault(tuple(parts[:length]), f"override {shown(override)}")
    if problems:
        raise ConfigError(*problems, state=NOTHING_READ)
    return Document(values, places)


def _section_at(path: Sequence[str | int]) -> type[Section] | None:
    """Return the config section that a dotted path names, or None."""
    section: type[Section] = RunConfig
    for part in path:
        field = section.model_fields.get(str(part))
        inner = section if isinstance(part, int) else _section_of(field.annotation, deep=True) if field else None
        if inner is None:
            return None
        section = inner
    return section


def _section_of(annotation: Any, deep: bool = False) -> type[Section] | None:
    """Return the section that a field is; with `deep` also the one that its list holds."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
        if deep and candidate is not annotation and (found := _section_of(candidate, deep)):
            return found
    return None


def _all_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := _section_of(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _explain_unknown(path: Key) -> str:
    """Return what to write in place of an unknown key."""
    key, where = str(path[-1]), _dotted(path[:-1])
    section = _section_at(path[:-1])
    known = list(section.model_fields) if section else []
    by_name = {dotted.split(".")[-1]: dotted for dotted in reversed(list(_all_keys()))}
    elsewhere = OTHER_NAMES.get(key.replace("-", "_"))
    if elsewhere is None and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.75)):
        hint = f'did you mean "{close[0]}"?'
    elif key in by_name:
        hint = f"it belongs at {by_name[key]}."
    elif elsewhere is not None:
        hint = f"here that is {elsewhere}."
    elif close := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        hint = f'did you mean "{close[0]}"?'
    elif close := difflib.get_close_matches(key, by_name, n=1, cutoff=0.75):
        hint = f"did you mean {by_name[close[0]]}?"
    else:
        hint = f"{where or 'the top level'} has {', '.join(known)}."
    return f'unknown key "{shown(key)}"{f" under {where}" if where else ""}; {hint}'


def _dotted(path: Sequence[str | int]) -> str:
    return shown(".".join(map(str, path)))


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "a list of at least one",
    "dict_type": "keys with values",
    "model_type": "keys with values",
}


def _explain(error: ValidationError, document: Document) -> dict[Key, str]:
    """Return one sentence for each wrong key, with the value seen and what is accepted."""
    sentences: dict[Key, str] = {}
    expected: dict[Key, list[str]] = {}
    for item in error.errors():
        path = _without_unions(item["loc"], document.values, item["type"] == "missing")
        if item["type"] == "missing":
            sentences[path] = f"{_dotted(path)} is missing; it has no default."
        elif item["type"] == "extra_forbidden":
            sentences[path] = _explain_unknown(path)
        else:
            message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
            expected.setdefault(path, []).append(_EXPECTED.get(item["type"], message))
    wrong = (*sentences, *expected)
    for path, wanted in expected.items():
        if not any(other[: len(path)] == path != other for other in wrong):  # else the mistake is known more exactly
            sentences[path] = _explain_value(path, wanted, _value_at(document.values, path))
    return sentences


def _explain_value(path: Key, wanted: Sequence[str], seen: Any) -> str:
    """Return what is wrong with a value, and what to write where it is a usual mistake."""
    sentence = f"{_dotted(path)}: expected {' or '.join(dict.fromkeys(wanted))}; found {_show(seen)}."
    choices = re.findall(r"'([^']+)'", " ".join(wanted))
    if seen is None:
        sentence += f" Leave {_dotted(path)} out for the default."
    elif seen in ("None", "none", "nil"):
        sentence += " In YAML nothing is null."
    elif "a list" in wanted and isinstance(seen, str):
        sentence += f" Write it as a list: [{shown(', '.join(re.split('[, ]+', seen)))}]."
    elif close := difflib.get_close_matches(str(seen), choices, n=1, cutoff=0.4):
        sentence += f' Did you mean "{close[0]}"?'
    return sentence


def _without_unions(path: Sequence[str | int], values: Any, missing: bool) -> Key:
    """Return the path of a wrong key as it stands in the file: a union adds the name of its member to it."""
    found: list[str | int] = []
    for part in path:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values))
        if inside:
            found.append(part)
            values = values[part]
    return (*found, path[-1]) if missing else tuple(found)


def _value_at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values[part]
    return values


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    kind = {str: "text", bool: "true/false", dict: "keys", list: "a list"}.get(type(value))
    return f"{shown(text)} ({kind})" if kind else shown(text)


def _check(document: Document) -> tuple[RunConfig | None, dict[Key, str]]:
    """Return the config, None where keys that it needs are wrong, and a sentence for each wrong key."""
    sentences: dict[Key, str] = {}
    config: RunConfig | None
    try:
        config = RunConfig.model_validate(document.values)
    except ValidationError as error:
        sentences = _explain(error, document)
        config = _without(document.values, sentences)
    if config is not None:
        for key, what in check_config(config).items():
            sentences.setdefault(tuple(key.split(".")), f"{key}: {what}.")
    return config, sentences


def refused(values: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong with plain values, as {dotted key: sentence}."""
    return {".".join(map(str, path)): sentence for path, sentence in _check(Document(values, {}))[1].items()}


def _validate(document: Document, name: str) -> RunConfig:
    """Return the config, or raise ConfigError with every problem in the order of the file, each with its place."""
    config, sentences = _check(document)
    if config is None or sentences:
        order = {path: index for index, path in enumerate(document.places)}
        paths = sorted(sentences, key=lambda path: order.get(path, -1))
        problems = [f"{document.place(path) or name}: {sentences[path]}" for path in paths]
        raise ConfigError(*problems, state=NOTHING_READ)
    return config


def _without(values: dict[str, Any], wrong: Iterable[Key]) -> RunConfig | None:
    """Return the config without its wrong keys, so that the rest can be checked too; None where it needs them."""
    rest = copy.deepcopy(values)
    for *above, last in wrong:
        section: Any = rest
        for part in above:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    try:
        return RunConfig.model_validate(rest)
    except ValidationError:
        return None


def read(path: Path) -> Document:
    """Read a file of keys and values, whatever they mean. Raises ConfigError, SurroundingsError."""
    if not path.is_file():
        there = [*path.glob("*.y*ml"), *path.parent.glob("*.y*ml")]
        near = difflib.get_close_matches(path.name, [p.name for p in there], n=3, cutoff=0.4)
        if path.is_dir():
            near = [p.name for p in there[:3]]
        hint = f" Did you mean {' or '.join(near)}?" if near else " `lora init` writes one to start from."
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: the config {what}.{hint}", state=NOTHING_READ)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SurroundingsError(f"{path}: cannot be read: {error.strerror}.", state=NOTHING_READ) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: {len(raw):,} bytes is too large for a config; at most {MAX_BYTES:,} are read.", state=NOTHING_READ
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.", state=NOTHING_READ
        ) from None
    return parse(text, str(path))


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a config file and apply `a.b=value` overrides. Raises ConfigError with every problem and its place."""
    return _validate(read_document(path, overrides), str(path))


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Return a config's values as they are written, each with its place. Raises ConfigError."""
    return _overridden(read(path), overrides, str(path))


def from_values(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Make a config of plain values, as `load` does of a file's. Raises ConfigError."""
    places: dict[Key, str] = {(key,): "config" for key in values}
    return _validate(_overridden(Document(plain(values), places), overrides, "config"), "config")


def _overridden(document: Document, overrides: Sequence[str], name: str) -> Document:
    document = _override(document, overrides)
    require_no_secret(document, name)
    return document


def dump(config: RunConfig) -> str:
    """Return the whole config as YAML, every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema that editors complete and check configs with."""
    schema = RunConfig.model_json_schema() | {"title": "lora config"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
