"""Recipes: configs for a purpose or a machine, which come with the package; `lora init --recipe NAME` writes one."""

import difflib
import re
from collections.abc import Mapping
from importlib import resources

from lora_cli.errors import NOTHING_READ, InputError, shown
from lora_cli.strict_yaml import dump_inline

# Where a recipe names what is the user's own: the line with that key, and the value in it.
_LINES = {
    "model.path": re.compile(r"(?m)^(model: |  path: )(\S+)"),
    "data.train": re.compile(r"(?m)^(  train: )(\S+)"),
    "output_dir": re.compile(r"(?m)^(output_dir: )(\S+)"),
}


def names() -> dict[str, str]:
    """Return every recipe's name with its first line, which says what it is for."""
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(_texts().items())}


def text(name: str, given: Mapping[str, str]) -> str:
    """Return a recipe with the user's own model.path, data.train and output_dir, where they are given.

    Raises InputError.
    """
    known = _texts()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}."
        raise InputError(
            f"--recipe {shown(name)}: no such recipe; {hint} `lora init --list` says what each is for.",
            state=NOTHING_READ,
        )
    changed = known[name]
    for key, value in given.items():
        found = _LINES[key].search(changed)
        assert found is not None, f"{name} names its {key}"
        changed = changed[: found.start(2)] + dump_inline(value) + changed[found.end(2) :]
    return changed


def _texts() -> dict[str, str]:
    folder = resources.files("lora_cli") / "recipes"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}
