"""Strict YAML: plain values and the place of each key. Every oddity that YAML forgives is an error here.

YAML is read by the rules of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `3e-4` is a
number, `no` is a string, `010` is ten. PyYAML reads YAML 1.1, so the loader below replaces its implicit types.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from lora_cli.errors import NOTHING_READ, ConfigError
from lora_cli.redact import cut

MAX_DEPTH = 20
MAX_NODES = 20_000

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's implicit types only, and a budget that it keeps to while it reads."""

    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # of a library without types
            raise yaml.MarkedYAMLError(None, None, "it is nested too deeply or too large for a config", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
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
    try:
        return int(node.value.replace("_", ""))
    except ValueError:
        problem = f"a number of {len(node.value):,} digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _real(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


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


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        documents = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        reason = str(error.problem or error.context)
        if "\\t" in reason:
            reason += "; indent with spaces, not tabs"
        elif any(sign in reason for sign in ("alias", "'%'", "'@'", "'`'")):
            reason += "; put the value in quotes"
        raise ConfigError(f"{place}: this is not YAML: {reason}.", state=NOTHING_READ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: this is not YAML: {error}.", state=NOTHING_READ) from None
    if len(documents) > 1:
        mark = documents[1].start_mark
        raise ConfigError(
            f"{name}:{mark.line + 1}:1: a second document begins here; a config is one document.",
            state=NOTHING_READ,
        )
    return documents[0] if documents else None


def _iter_keys(node: yaml.Node, at: Key, name: str, problems: list[str]) -> Iterator[tuple[Key, yaml.Mark]]:
    """Iterate over (key, mark); note duplicate keys, aliases that contain themselves, and too much depth."""
    stack: list[tuple[yaml.Node, Key, frozenset[int]]] = [(node, at, frozenset())]
    seen = 0
    while stack:
        node, at, above = stack.pop()
        seen += 1
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        if id(node) in above or len(at) > MAX_DEPTH or seen > MAX_NODES:
            reason = "contains itself" if id(node) in above else "is nested too deeply or too large"
            raise ConfigError(f"{name}:{line}:{column}: this value {reason}.", state=NOTHING_READ)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TYPES:
            problems.append(f"{name}:{line}:{column}: the tag {node.tag} is not accepted.")
        above = above | {id(node)}
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key_node, value_node in node.value:
                mark = key_node.start_mark
                place = f"{name}:{mark.line + 1}:{mark.column + 1}"
                key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
                if key in first:
                    problems.append(f'{place}: duplicate key "{key}" (first on line {first[key]}).')
                first.setdefault(key, mark.line + 1)
                yield (*at, key), mark
                stack.append((value_node, (*at, key), above))
        elif isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                yield (*at, index), child.start_mark
                stack.append((child, (*at, index), above))


def _construct(node: yaml.Node, name: str) -> Any:
    try:
        return _Loader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{place}: {error.problem} cannot be read.", state=NOTHING_READ) from None


def parse(text: str, name: str) -> Document:
    node = _compose(text, name)
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise ConfigError(f"{name}: the file is empty. `lora init` writes a config to start from.", state=NOTHING_READ)
    if not isinstance(node, yaml.MappingNode):
        seen = "a list" if isinstance(node, yaml.SequenceNode) else f'the text "{cut(str(node.value), 60)}"'
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


def read_value(text: str) -> Any:
    """Read one YAML value, as an override gives it. Raises ConfigError."""
    node = _compose(text, "override")
    if node is None:
        return None
    problems: list[str] = []
    dict(_iter_keys(node, (), "override", problems))
    if problems:
        raise ConfigError(*problems, state=NOTHING_READ)
    return _construct(node, "override")


def dump(values: Any) -> str:
    """Return plain values as block YAML."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def dump_inline(value: Any) -> str:
    """Return one plain value as it stands behind a key."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.strip().removesuffix("...").strip()
