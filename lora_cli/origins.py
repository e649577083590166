"""Where each value of a config comes from: its file, an override, a default, or what goes with the method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli import config_file
from lora_cli.config import RunConfig
from lora_cli.schema import defaults, flat
from lora_cli.strict_yaml import Document

DEFAULT, METHOD, SEARCH = "default", "goes with the method", "set for a trial or a search"


def of(config: RunConfig, path: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return where each value of a config comes from, by dotted keys; it was loaded from this file.

    A file is named without the folders that it lies in.
    """
    document = config_file.read_document(path, overrides)
    known = dict(defaults(RunConfig))
    return {key: _of(key, value, known.get(key), document, path) for key, value in flat(config)}


def _of(key: str, value: Any, default: Any, document: Document, path: Path) -> str:
    parts = tuple(key.split("."))
    if not _is_written(document, parts):
        return DEFAULT if value == default else METHOD
    place = document.place(parts) or ""
    if not place.startswith(f"{path}:"):
        return place  # an override, in its own words
    line = place.removeprefix(f"{path}:").split(":")[0]
    return f"{path.name}:{line}"


def _is_written(document: Document, parts: Sequence[str]) -> bool:
    """Return whether a key has a value in a config or its overrides; `model: NAME` is one of model.path."""
    above: Any = document.values
    if parts == ("model", "path") and isinstance(above.get("model"), str):
        return True
    for part in parts:
        if not isinstance(above, dict) or part not in above:
            return False
        above = above[part]
    return True
