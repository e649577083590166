"""Arguments that Typer cannot read by itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lora_cli.errors import NOTHING_READ, InputError
from lora_cli.redact import redact


def require_no_secret(arguments: Sequence[str]) -> None:
    """Raise InputError where an argument holds a secret: other users of the machine see it, and messages say it."""
    if numbers := [str(number) for number, text in enumerate(arguments, start=1) if redact(text) != text]:
        raise InputError(
            f"Argument {', '.join(numbers)} of the command holds what looks like a key or a password, seen by others "
            "on this machine. Take it out: the hub's token comes from `hf auth login` or HF_TOKEN.",
            state=NOTHING_READ,
        )


def paths_and_weights(runs: list[Path], weights: str | None) -> tuple[list[Path], list[float] | None]:
    """Return the adapters and their weights: of `A B --weights 0.7 0.3` the second number comes among the adapters."""
    if weights is None:
        return runs, None
    paths = [run for run in runs if run.exists() or not _is_number(str(run))]
    texts = [*weights.replace(",", " ").split(), *(str(run) for run in runs if run not in paths)]
    if wrong := [text for text in texts if not _is_number(text)]:
        raise InputError(f"--weights: expected numbers, found {wrong[0][:40]}.")
    return paths, [float(text) for text in texts]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def one_of(option: str, value: str, known: Any) -> Any:
    """Return an option's value if it is one of a Literal's. Raises InputError."""
    if value not in get_args(known):
        raise InputError(f"{option}: expected {', '.join(get_args(known))}, not {value[:40]}.")
    return value
