"""What the shell offers behind TAB: keys of the config and their values, configs, runs, the words an option takes.

A shell ends a word that has one completion with a space. So a key that is the only one is offered with its values too,
and a folder that is the only one with what is in it. Nothing here may raise: a shell would show it in the middle of a
line that is being typed.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lora_cli.config import RunConfig
from lora_cli.run_dir import is_run_dir
from lora_cli.schema import Section

_MOST = 72  # characters of a description; a longer one would be folded, and its second line be taken for a word
Offers = list[tuple[str, str]]  # what may be typed, and what it means


def words(*known: str) -> Callable[[str], list[str]]:
    """Return what offers the words that an option takes."""

    def offer(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return offer


# --- KEY=VALUE ---


def overrides(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer dotted keys with their descriptions, and behind KEY= the values of KEY.

    bash takes `=` as the end of a word: what is before it is an argument then, and only the value is asked for.
    """
    given = [word for word in ctx.params.get("overrides") or [] if word != "="]
    if given and _field(given[-1]) is not None:
        return [one for one in _values(given[-1]) if one[0]]
    key, equals, _ = incomplete.partition("=")
    return [(f"{key}={value}", what) for value, what in _values(key)] if equals else _keys(incomplete)


def _keys(incomplete: str) -> Offers:
    *above, begun = incomplete.split(".")
    section = _section(above)
    names = [name for name in section.model_fields if name.startswith(begun)] if section else []
    offers: Offers = []
    for name in names:
        key = ".".join([*above, name])
        inner = _section([*above, name])
        offers.append((f"{key}.", _short(inner.__doc__)) if inner else (f"{key}=", _description(key)))
    if len(offers) != 1:
        return offers
    only = offers[0][0]
    if only.endswith("."):
        return _keys(only)
    return list(dict([*offers, *((f"{only}{value}", what) for value, what in _values(key) if value)]).items())


def _section(path: list[str]) -> type[Section] | None:
    """Return the section of a dotted path, None where that is none."""
    section: Any = RunConfig
    for part in path:
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
    return section


def _field(key: str) -> FieldInfo | None:
    *above, name = key.split(".")
    section = _section(above)
    return section.model_fields.get(name) if section else None


def _description(key: str) -> str:
    field = _field(key)
    return _short(field.description) if field else ""


def _short(text: str | None) -> str:
    """Return a text for one line beside a word, without the brackets in which Typer looks for markup."""
    plain = (text or "").strip().rstrip(".").translate(str.maketrans("[]", "()"))
    return plain if len(plain) <= _MOST else f"{plain[: _MOST - 3].rstrip()}..."


def _values(key: str) -> Offers:
    """Offer the words that a key takes and its default; for a key that takes others too, also none of them."""
    field = _field(key)
    if field is None:
        return []
    offers = dict.fromkeys(_words(field.annotation), "")
    if field.default is not PydanticUndefined and not isinstance(field.default, tuple | Section):
        offers[_as_yaml(field.default)] = "the default"
    return list(offers.items()) if len(offers) > 1 else [("", _short(field.description)), *offers.items()]


def _words(annotation: Any) -> Iterator[str]:
    """Iterate over the words among the values of a type."""
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is NoneType:
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from map(_as_yaml, get_args(annotation))
    elif get_origin(annotation) is not tuple:
        for inner in get_args(annotation):
            yield from _words(inner)


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- paths ---


def configs(incomplete: str) -> list[str]:
    """Offer YAML files, and folders on the way to them."""
    return _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))


def runs(incomplete: str) -> list[str]:
    """Offer run directories and adapters, and folders on the way to them."""
    return _paths(incomplete, lambda path: is_run_dir(path) or (path / "adapter_config.json").is_file())


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> list[str]:
    """Return what is wanted, and folders, whose names go on as begun; nothing where the shell knows better."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        above, slash, begun = incomplete.rpartition("/")
        folder = Path(above + slash).expanduser()
        found = []
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(begun) or (path.name.startswith(".") and not begun):
                continue
            name = above + slash + path.name
            if is_wanted(path):
                found.append(name)
            if path.is_dir():
                found.append(f"{name}/")
        if len(found) == 1 and found[0].endswith("/"):
            return _paths(found[0], is_wanted) or found
        return [] if any(" " in name for name in found) else found
    return []
