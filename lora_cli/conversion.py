"""What becomes of the keys of another program's config: taken over, not needed here, or not possible here."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_cli.errors import shown
from lora_cli.strict_yaml import dump_inline


@dataclass(frozen=True)
class Taken:
    """A key of theirs that sets a key here."""

    key: str  # theirs
    value: Any  # there
    ours: str  # the key here, dotted
    our_value: Any  # here
    differs: str | None = None  # what is not the same all the same; null: nothing


@dataclass(frozen=True)
class Unsaid:
    """A key that is set here because of a default of theirs, which their file does not spell out."""

    ours: str  # the key here, dotted
    our_value: Any  # here
    why: str  # it is set


@dataclass(frozen=True)
class NotNeeded:
    """A key of theirs that has nothing to say here."""

    key: str  # theirs
    value: Any  # there
    why: str  # it has nothing to say


@dataclass(frozen=True)
class NotPossible:
    """A key of theirs that cannot be honoured."""

    key: str  # theirs
    value: Any  # there
    why: str  # it cannot be honoured, and what to do instead
    changes_training: bool  # whether something else is trained without it


Outcome = Taken | Unsaid | NotNeeded | NotPossible


@dataclass(frozen=True)
class ConversionReport:
    """What became of every key of another program's config; each is in one list."""

    config: Path  # the file that was written
    source: Path  # theirs
    program: str  # its name
    taken: Sequence[Taken]  # keys that set a key here
    unsaid: Sequence[Unsaid]  # keys set here that their file does not spell out
    not_needed: Sequence[NotNeeded]  # keys with nothing to say here
    not_possible: Sequence[NotPossible]  # keys that cannot be honoured

    @property
    def other_training(self) -> Sequence[NotPossible]:
        """What cannot be honoured and changes what is trained."""
        return [left for left in self.not_possible if left.changes_training]


@dataclass(frozen=True)
class Source:
    """A config of another program, as it was read."""

    values: Mapping[str, Any]
    path: Path
    processes: int  # on which it was run

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; the default where there is none, or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """Return a value that is a finite number, or text that says one; a whole one as int."""
        value = self.values.get(key)
        try:
            number = float(value) if not isinstance(value, bool) and value is not None else math.nan
        except (TypeError, ValueError, OverflowError):
            return None
        if not math.isfinite(number):
            return None
        return int(number) if number.is_integer() else number

    def given(self, *keys: str) -> Iterator[tuple[str, Any]]:
        """Iterate over those keys that the file gives a value."""
        yield from ((key, self.values[key]) for key in keys if not is_off(self.values.get(key)))


def is_off(value: Any) -> bool:
    """Return whether a value says nothing, or switches something off."""
    return value is None or value is False or value in ("", "none", "no", [], {})


@dataclass(frozen=True)
class Rule:
    """Keys of theirs that are read together, and the keys here that they set."""

    keys: Sequence[str]
    ours: Sequence[str]
    convert: Callable[[Source], Iterable[Outcome]]


@dataclass(frozen=True)
class Fixed:
    """A key for which there is one way here; other values cannot be honoured."""

    accepted: Sequence[Any]  # values, or patterns of text
    fine: str
    otherwise: str
    changes_training: bool = True

    def outcome(self, key: str, value: Any) -> Outcome:
        """Return what becomes of a value."""
        if any(value == one or fnmatchcase(str(value).lower(), str(one).lower()) for one in self.accepted):
            return NotNeeded(key, value, self.fine)
        return NotPossible(key, value, self.otherwise, self.changes_training)


Reasons = Mapping[str, str]  # a pattern of keys -> why they are left out


def reasons(groups: Mapping[str, str]) -> Reasons:
    """Return groups of keys, {why: "key key other_*"}, by key."""
    return {pattern: why for why, patterns in groups.items() for pattern in patterns.split()}


@dataclass(frozen=True)
class Peer:
    """Another program's config: how it is known, and what its keys are here."""

    name: str
    page: str  # of the documentation
    must_have: str  # the key that names the model
    marks: frozenset[str]  # keys of which one more must be there
    same: Mapping[str, str]  # keys that mean the same here
    rules: Sequence[Rule]
    fixed: Mapping[str, Fixed]
    not_needed: Reasons
    not_possible: Reasons
    other_training: Reasons  # not possible, and something else is trained without it

    def keys(self) -> dict[str, tuple[str, ...]]:
        """Return each of their keys that can be taken over, and the keys here that it may set."""
        return {their: (our,) for their, our in self.same.items()} | {
            key: tuple(rule.ours) for rule in self.rules for key in rule.keys
        }


def reason_for(key: str, table: Reasons) -> str | None:
    """Return the reason for a key, or for a pattern that it matches."""
    return table.get(key) or next((why for pattern, why in table.items() if fnmatchcase(key, pattern)), None)


def said(key: str, value: Any) -> str:
    """Return a key with its value, as it stood there; of a long one the beginning."""
    return f"{key}:{f' {shown(dump_inline(value), 60)}' if value not in (None, '') else ''}"
