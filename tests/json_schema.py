"""JSON Schema, draft 2020-12, as far as ours goes: what an editor does with it. An unknown keyword is an error here."""

from collections.abc import Iterator
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": (list, tuple),
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_SAYS_NOTHING = {"$defs", "$schema", "title", "description", "default"}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "") -> Iterator[str]:
    """Every place at which a value is not as its schema says."""
    for keyword, wanted in schema.items():
        if keyword in _SAYS_NOTHING or not _applies(keyword, value):
            continue
        match keyword:
            case "$ref":
                yield from problems(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, at)
            case "anyOf":
                if all(any(True for _ in problems(value, one, root, at)) for one in wanted):
                    yield at
            case "properties":
                for name in wanted.keys() & value.keys():
                    yield from problems(value[name], wanted[name], root, f"{at}/{name}")
            case "additionalProperties":
                for name in value.keys() - schema.get("properties", {}).keys():
                    inner = {"enum": []} if wanted is False else wanted
                    yield from problems(value[name], inner, root, f"{at}/{name}")
            case "propertyNames":
                for name in value:
                    yield from problems(name, wanted, root, f"{at}/{name}")
            case "items":
                for index, one in enumerate(value):
                    yield from problems(one, wanted, root, f"{at}/{index}")
            case _ if not _holds(keyword, wanted, value):
                yield at


def _applies(keyword: str, value: Any) -> bool:
    """Whether a keyword says anything of such a value."""
    kinds = {"object": ("properties", "additionalProperties", "propertyNames", "required", "minProperties")}
    kinds |= {"array": ("items", "minItems"), "string": ("minLength",)}
    kinds |= {"number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")}
    wanted = next((kind for kind, keywords in kinds.items() if keyword in keywords), None)
    return wanted is None or _is(value, wanted)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (not isinstance(value, bool) or kind == "boolean")


def _holds(keyword: str, wanted: Any, value: Any) -> bool:
    match keyword:
        case "type":
            return _is(value, wanted)
        case "const":
            return bool(value == wanted)
        case "enum":
            return value in wanted
        case "required":
            return set(wanted) <= value.keys()
        case "minimum":
            return bool(value >= wanted)
        case "maximum":
            return bool(value <= wanted)
        case "exclusiveMinimum":
            return bool(value > wanted)
        case "exclusiveMaximum":
            return bool(value < wanted)
        case "minItems" | "minLength" | "minProperties":
            return len(value) >= wanted
    raise NotImplementedError(keyword)
