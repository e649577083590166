"""Which packages lora and its extras want, by its own metadata, and which of them are installed."""

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from lora_cli.doctor_report import Package

NAME = "lora-cli"


def all_wanted() -> list[Package]:
    """Return what lora wants, then what its extras do; nothing where it runs without being installed."""
    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return []
    found = [package for line in lines for package in _packages(line)]
    return sorted(found, key=lambda package: (package.extra or "", package.name))


def _packages(line: str) -> Iterator[Package]:
    """Return a line of metadata as a package: `optuna>=4.5; extra == "tune"`."""
    requirement = Requirement(line)
    extras = metadata.metadata(NAME).get_all("Provides-Extra") or []
    wanting = [None] if requirement.marker is None or requirement.marker.evaluate({"extra": ""}) else extras
    for extra in wanting:
        if extra is None or (requirement.marker and requirement.marker.evaluate({"extra": extra})):
            version = _version(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            yield Package(requirement.name, extra, str(requirement.specifier), version, fits)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
