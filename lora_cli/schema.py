"""What the sections of a config are made of: strict types, and what becomes of a run whose key changes."""

from collections.abc import Iterator
from enum import Enum
from functools import reduce
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema


class OnResume(Enum):
    """What becomes of a run that goes on with another value of a key; each key says which."""

    FREE = "nothing that is computed changes"
    NOTED = "sums may be rounded in another way: said, and written down"
    OVERRIDE = "the rest is trained in another way: only with --override, and written down"
    FIXED = "it would be another run: only in another output_dir"


T = TypeVar("T")
Free = Annotated[T, OnResume.FREE]
Noted = Annotated[T, OnResume.NOTED]
Override = Annotated[T, OnResume.OVERRIDE]
Fixed = Annotated[T, OnResume.FIXED]


def _reject_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


# Strict: "8" is no number, true is no number, 1.5 is no whole number; nan and inf are refused.
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
Text = Annotated[str, AfterValidator(_reject_empty), WithJsonSchema({"type": "string", "minLength": 1})]


class Section(BaseModel):
    """A frozen part of the config that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def flat(config: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (dotted key, value) of every leaf."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def rules(section: type[Section], prefix: str = "") -> Iterator[tuple[str, OnResume | None]]:
    """Iterate over (dotted key, its rule) of a section; a key without one is as FIXED."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from rules(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, next((rule for rule in field.metadata if isinstance(rule, OnResume)), None)


def defaults(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (dotted key, its default) of a section; a key without one is left out."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from defaults(field.annotation, f"{prefix}{name}.")
        elif not field.is_required():
            yield prefix + name, field.default


def value_of(config: Section, key: str) -> Any:
    """Return the value of a dotted key."""
    return reduce(getattr, key.split("."), config)
