"""Where the data sources of another program's config stand here, and how their rows are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Taken
from lora_cli.sources import is_hub_id

_COLUMNS = {"messages": "messages", "sharegpt": "conversations"}  # in which the rows of a format have their messages
_NAMES = {("role", "content"): "messages", ("from", "value"): "sharegpt"}  # of what is in a message


@dataclass(frozen=True)
class Place:
    """Where a source stands: data.train itself where there is one, else a place in its list."""

    index: int | None

    def key(self, name: str) -> str:
        """Return the dotted key of a setting of this source."""
        if self.index is None:
            return "data.train" if name == "path" else f"data.{name}"
        return f"data.train[{self.index}].{name}"


def message_format(role: str, content: str) -> str | None:
    """Return the format whose messages have these keys; None where there is none."""
    return _NAMES.get((role, content))


def renamed(wanted: Mapping[str, str | None]) -> dict[str, str]:
    """Return data.fields for keys of a format and their columns, without those that are called the same."""
    return {key: column for key, column in wanted.items() if column is not None and column != key}


def message_fields(format: str, column: str | None) -> dict[str, str | None]:
    """Return in which column the messages of a format stand, as for `renamed`."""
    return {_COLUMNS[format]: column}


def place_of_split(key: str, value: Any, path: str, place: Place) -> Outcome:
    """Return what becomes of a split: only data sets of the hub have any, and whole ones alone are read."""
    if not is_hub_id(path):
        return NotNeeded(key, value, "a file has no splits")
    if set(str(value)) & set("[+"):
        return NotPossible(key, value, "only a whole split can be read", True)
    return (
        NotNeeded(key, value, "is what is read") if value == "train" else Taken(key, value, place.key("split"), value)
    )


def place_of_subset(key: str, value: Any, path: str, place: Place) -> Outcome:
    """Return what becomes of a subset: only data sets of the hub have any."""
    if is_hub_id(path):
        return Taken(key, value, place.key("subset"), value)
    return NotNeeded(key, value, "a file has no subsets")


def share(value: float) -> float | int:
    """Return how many rows are held out: a share below 1, else a number of rows, as there."""
    return int(value) if value >= 1 or value == 0 else float(value)


def chat_template(key: str, value: Any, here: Mapping[str, str]) -> Iterator[Outcome]:
    """Iterate over what becomes of a template's name: the model's own, but for those that have one here."""
    name = str(value)
    if name in here:
        yield Taken(key, value, "data.chat_template", here[name])
    else:
        yield Taken(
            key, value, "data.chat_template", None, f"the model's own, which may differ from {name}: look at it"
        )
