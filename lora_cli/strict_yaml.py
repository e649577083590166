"""Strict YAML: plain values and the place of each key. Every oddity that YAML forgives is an error here.

YAML is read by the rules of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `3e-4` is a
number, `no` is a string, `010` is ten. PyYAML reads YAML 1.1, so the loader below replaces its implicit types.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from lora_cli.errors import NOTHING_READ, ConfigError, shown
from lora_cli.redact import redact

MAX_DEPTH = 20
MAX_NODES = 5_000
MAX_DIGITS = 1_000

_CHARACTERS = re.compile("[\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # that YAML may hold

_TOO_LARGE = f"is nested too deeply or too large; at most {MAX_DEPTH} deep and {MAX_NODES:,} values are read"

_HALVES = re.compile("[\ud800-\udfff]")  # of a character, as an escape in quotes can write one

Key = tuple[str | int, ...]


class _TooLarge(yaml.MarkedYAMLError):
    """More than a config has."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's implicit types only; it stops where there is more than a config has."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH or self._nodes > MAX_NODES:
            begins = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML says no types here
            raise _TooLarge(None, None, _TOO_LARGE, begins.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_TYPES = ("null", "bool", "int", "float", "merge", "str", "seq", "map")
_Loader.yaml_implicit_resolvers = {}
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    if len(digits) > MAX_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(digits)} digits, at most {MAX_DIGITS} are read", node.start_mark
        )
    return int(digits)


def _real(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes every text that either version of YAML would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*_Loader.yaml_implicit_resolvers.get(first, []), *yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])]
    for first in _Loader.yaml_implicit_resolvers.keys() | yaml.SafeDumper.yaml_implicit_resolvers.keys()
}


@dataclass(frozen=True)
class Document:
    """A parsed document: plain values, and where each key stands (`file:line:column`)."""

    values: dict[str, Any]
    places: dict[Key, str]

    def place(self, path: Key) -> str | None:
        """Return where a key stands, or the nearest section above it; None when the file has neither."""
        for length in range(len(path), 0, -1):
            if place := self.places.get(path[:length]):
                return place
        return None


_QUOTES = "; put the value in quotes"
_HINTS = {  # by what the parser says
    "\\t": "; indent with spaces, not tabs",
    "alias": _QUOTES,
    "'%'": _QUOTES,
    "'@'": _QUOTES,
    "'`'": _QUOTES,
    "mapping values": "; put a space behind each key's colon, indent the keys of a section alike, and put a value that "
    "holds a colon in quotes",
    "end of stream": "; a quote is not closed",
    "could not find": "; put a space behind each key's colon",
    "<block end>": "; indent the keys of a section alike",
    "<document start>": "; a config is keys and values (`model: ...`)",
}


def _place_of(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name


def _construct(node: yaml.Node, name: str) -> Any:
    try:
        return _Loader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        place, reason = _place_of(error, name), shown(error.problem, 100)
        raise ConfigError(f"{place}: this cannot be a value or a key: {reason}.", state=NOTHING_READ) from None


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        documents = list(yaml.compose_all(text, Loader=_Loader))
    except _TooLarge as error:
        raise ConfigError(f"{_place_of(error, name)}: this value {error.problem}.", state=NOTHING_READ) from None
    except yaml.MarkedYAMLError as error:
        place, reason = _place_of(error, name), shown(error.problem or error.context, 100)
        hint = next((hint for sign, hint in _HINTS.items() if sign in reason), "")
        raise ConfigError(f"{place}: this is not YAML: {reason}{hint}.", state=NOTHING_READ) from None
    except yaml.YAMLError:  # a character that no YAML may hold
        at = next((at for at, character in enumerate(text) if not _CHARACTERS.fullmatch(character)), 0)
        place = f"{name}:{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"
        raise ConfigError(
            f"{place}: this is not YAML: it holds the character U+{ord(text[at]):04X}; take it out.", state=NOTHING_READ
        ) from None
    if len(documents) > 1:
        mark = documents[1].start_mark
        raise ConfigError(
            f"{name}:{mark.line + 1}:1: a second document begins here; a config is one document.",
            state=NOTHING_READ,
        )
    return documents[0] if documents else None


def _wrong_with(node: yaml.Node) -> str | None:
    """Return what is wrong with a key or a value by itself."""
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TYPES:
        return f"the tag {shown(node.tag)} is not accepted; write the plain value"
    if isinstance(node, yaml.ScalarNode) and _HALVES.search(node.value):
        return "holds half of a character; write the whole one"
    return None


def _iter_keys(node: yaml.Node, at: Key, name: str, problems: list[str]) -> Iterator[tuple[Key, yaml.Mark]]:
    """Iterate over (key, mark); note duplicate keys, aliases that contain themselves, and too much depth."""
    stack: list[tuple[yaml.Node, Key, frozenset[int]]] = [(node, at, frozenset())]
    seen = 0
    while stack:
        node, at, above = stack.pop()
        seen += 1
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        if id(node) in above or len(at) > MAX_DEPTH or seen > MAX_NODES:
            reason = "contains itself; write it out" if id(node) in above else _TOO_LARGE
            raise ConfigError(f"{name}:{line}:{column}: this value {reason}.", state=NOTHING_READ)
        if wrong := _wrong_with(node):
            problems.append(f"{name}:{line}:{column}: {wrong}.")
        above = above | {id(node)}
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key_node, value_node in node.value:
                mark = key_node.start_mark
                place = f"{name}:{mark.line + 1}:{mark.column + 1}"
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
                if not key_node.tag.endswith(":merge") and isinstance(key_node, yaml.ScalarNode):
                    key_node.tag = "tag:yaml.org,2002:str"  # a key is text, also where it looks like a number
                if wrong := _wrong_with(key_node):
                    problems.append(f"{place}: {wrong}.")
                elif key in first:
                    problems.append(
                        f'{place}: duplicate key "{shown(key)}" (first on line {first[key]}); leave one of them out.'
                    )
                first.setdefault(key, mark.line + 1)
                yield (*at, key), mark
                stack.append((value_node, (*at, key), above))
        elif isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                yield (*at, index), child.start_mark
                stack.append((child, (*at, index), above))


def parse(text: str, name: str) -> Document:
    node = _compose(text, name)
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise ConfigError(f"{name}: the file is empty. `lora init` writes a config to start from.", state=NOTHING_READ)
    if not isinstance(node, yaml.MappingNode):
        seen = "a list" if isinstance(node, yaml.SequenceNode) else f'the text "{shown(node.value, 60)}"'
        raise ConfigError(
            f"{name}:1:1: expected keys and values (`model: ...`), found {seen}. A colon needs a space after it.",
            state=NOTHING_READ,
        )
    problems: list[str] = []
    marks = sorted(_iter_keys(node, (), name, problems), key=lambda found: (found[1].line, found[1].column))
    places = {at: f"{name}:{mark.line + 1}:{mark.column + 1}" for at, mark in marks}
    if problems:
        raise ConfigError(*problems, state=NOTHING_READ)
    values = _construct(node, name)
    return Document({str(key): value for key, value in values.items()}, places)


def read_value(text: str, name: str) -> Any:
    """Read one YAML value, as an override gives it. Raises ConfigError."""
    node = _compose(text, name)
    if node is None:
        return None
    problems: list[str] = []
    dict(_iter_keys(node, (), name, problems))
    if problems:
        raise ConfigError(*problems, state=NOTHING_READ)
    return _construct(node, name)


def dump(values: Any) -> str:
    """Return plain values as block YAML."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_inline(value: Any) -> str:
    """Return one plain value as it stands behind a key."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.strip().removesuffix("...").strip()


def require_no_secret(document: Document, name: str) -> None:
    """Raise ConfigError where a key or a value looks like a secret, without repeating it."""

    def places(value: Any, at: Key) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from places(key, (*at, str(key)))
                yield from places(inner, (*at, str(key)))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                yield from places(inner, (*at, index))
        elif isinstance(value, str) and redact(value) != value:
            yield f"{document.place(at) or name}: {'.'.join(map(str, at))} holds what looks like a key or a password."

    if problems := list(dict.fromkeys(places(document.values, ()))):
        way = "Take it out: a config is copied into its run. The hub's token comes from `hf auth login` or HF_TOKEN."
        raise ConfigError(*problems, way, state=NOTHING_READ)
