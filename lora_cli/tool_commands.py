"""The commands that are about lora itself: doctor, version. What is slow to import is imported inside."""

from typing import Annotated

import typer

from lora_cli import __version__, console
from lora_cli.arguments import Json
from lora_cli.errors import SurroundingsError
from lora_cli.records import as_json
from lora_cli.reports import VersionReport


def doctor(
    no_test: Annotated[bool, typer.Option("--no-test", help="Do not try to train a small model.")] = False,
    json: Json = False,
) -> None:
    """Say what is here to train with, and what is missing."""
    from lora_cli import doctor as looking
    from lora_cli import doctor_tables

    report = looking.doctor(test=not no_test)
    if json:
        console.print_json(as_json(report))
    else:
        doctor_tables.show(report)
    if any(finding.level == "problem" for finding in report.findings):
        raise typer.Exit(SurroundingsError.exit_code)


def leave_with_version(wanted: bool) -> None:
    """Do what is usual for `--version`, where it is given."""
    if wanted:
        version()
        raise typer.Exit


def version(json: Json = False) -> None:
    """Print the version."""
    from importlib import metadata

    versions = as_json(VersionReport(__version__, metadata.version("torch"), metadata.version("transformers")))
    if json:
        console.print_json(versions)
    else:
        console.print_text(", ".join(f"{name} {number}" for name, number in versions.items()))
