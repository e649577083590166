"""Errors a user can do something about. Anything else that is raised is a bug of ours (exit code 1).

UserError
├── InputError          2   the input is wrong
│   ├── ConfigError         the YAML file or an override
│   ├── DataError           a data file or a row
│   ├── ModelError          the base model or its tokenizer
│   └── AdapterError        an adapter, a checkpoint, a run directory
├── SurroundingsError   3   disk, permission, network, device, memory
├── TrainingStopped     4   a loss or gradient that is not finite, or a loss that jumped
└── Interrupted   129, 130, 143  SIGHUP, Ctrl-C or SIGTERM, after saving
"""

from collections.abc import Sequence
from unicodedata import category

from lora_cli.redact import redact

# What state things are in when a stage fails.
NOTHING_READ = "No data or model was read, and nothing was written."
NOTHING_LOADED = "No weights were read, and nothing was written."
_JOINERS = "\u200c\u200d"  # of letters in Persian and Hindi, of emoji; as harmless as spaces outside ASCII


def shown(value: object, most: int = 80) -> str:
    """Return a value as messages show it: on one line, secrets hidden, and of a long one only the beginning."""
    text = redact(str(value))
    return one_line(text if len(text) <= most else text[: most - 1] + "…")


def first_line_of(error: Exception, most: int = 200) -> str:
    """Return the first line of what another library's error says, without its full stop."""
    return shown(str(error).strip().partition("\n")[0].rstrip("."), most)


def one_line(text: str) -> str:
    """Return a text with what a terminal would obey, cannot show, or turns letters around, spelt out."""
    return _spelt_out(text, "")


def in_lines(text: str) -> str:
    """Return a text as `one_line` does, with its lines and tabs."""
    return _spelt_out(text, "\n\t")


def _spelt_out(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    kept += _JOINERS
    return "".join(c if c.isprintable() or c in kept or category(c) == "Zs" else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """One or more problems of one stage, reported together.

    Each problem is a sentence: where, what is wrong, the value seen, what is accepted, how to fix it.
    `state` says what state things are in now. Secrets in them are hidden.
    """

    exit_code = 2
    most_shown = 10

    def __init__(self, *problems: str, state: str = "Nothing was written.") -> None:
        self.problems: Sequence[str] = tuple(one_line(redact(problem)) for problem in problems)
        super().__init__("\n".join(self.problems))
        self.state = state

    def paragraph(self) -> str:
        """Return the whole error as it is shown: the problems, then the state."""
        shown = list(self.problems[: self.most_shown])
        if len(self.problems) > self.most_shown:
            shown.append(f"... and {len(self.problems) - self.most_shown} more like these.")
        return "\n".join([*shown, self.state])


class InputError(UserError):
    """The input is wrong."""


class ConfigError(InputError):
    """The YAML file or an override is wrong."""


class DataError(InputError):
    """A data file or a row is wrong."""


class ModelError(InputError):
    """The base model or its tokenizer cannot be used."""


class AdapterError(InputError):
    """An adapter, a checkpoint or a run directory cannot be used."""


class SurroundingsError(UserError):
    """The machine stands in the way: disk, permission, network, device, memory."""

    exit_code = 3


class TrainingStopped(UserError):
    """Training cannot go on from here."""

    exit_code = 4


class Interrupted(UserError):
    """The user or the system asked to stop. `signal_number` gives the exit code: 129, 130 or 143."""

    def __init__(self, signal_number: int, *problems: str, state: str = "Nothing was written.") -> None:
        super().__init__(*problems, state=state)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
