"""What several commands are asked, and arguments that Typer cannot read by itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from lora_cli import completion
from lora_cli.errors import NOTHING_READ, InputError
from lora_cli.redact import redact

Config = Annotated[Path, typer.Argument(help="The YAML config.", show_default=False, autocompletion=completion.configs)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Override dotted keys, for example lora.rank=8.",
        autocompletion=completion.overrides,
    ),
]
Run = Annotated[
    Path,
    typer.Argument(
        help="A run directory, a checkpoint, or any PEFT adapter.",
        show_default=False,
        autocompletion=completion.runs,
    ),
]
Base = Annotated[str | None, typer.Option(help="The base model's place, when it moved.", show_default=False)]
HeldOutRows = Annotated[
    str | None, typer.Option(help="Held-out rows; without it the run's test or validation rows.", show_default=False)
]
General = Annotated[
    str | None,
    typer.Option(help="General text for forgetting, or false; else the run's.", show_default=False),
]
Push = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Also upload it to a new private hub repository.", show_default=False),
]
Processes = Annotated[int, typer.Option("--nproc", min=1, help="Share the work out to so many processes here.")]
Restarts = Annotated[
    int, typer.Option(min=0, help="With --nproc: start again so often after a process was lost or a disk was full.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing on stderr but warnings and errors.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


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
