"""`lora init`: a config for what is here, or a recipe, and beside it the schema that editors check it by."""

import glob
import json
import shlex
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

from lora_cli import base_folder, config_file, config_text, first_config, interrupt, recipe, storage
from lora_cli.errors import NOTHING_READ, ConfigError, ModelError
from lora_cli.init_report import InitReport, Survey
from lora_cli.nearby import did_you_mean
from lora_cli.records import Notice, Preparing
from lora_cli.sources import is_hub_id


def init(path: Path, given: Mapping[str, str], keep: bool = False) -> Generator[Notice | Preparing, None, InitReport]:
    """Write a config for a model and data, `given` with output_dir by their dotted keys; return what was decided.

    `keep`: what the model knows beyond the task is to stay. `require_new` comes before. Raises UserError; then nothing
    was written.
    """
    seen = yield from _look(given["model.path"], given["data.train"])
    decisions = first_config.decide(seen, keep)
    settings = {**given, **{each.key: each.value for each in decisions}}
    write(path, config_text.text(settings, {each.key: each.reason for each in decisions}))
    return InitReport(
        config=path,
        schema=path.parent / config_text.SCHEMA,
        recipe=None,
        seen=seen,
        decisions=decisions,
        warnings=list(first_config.warnings(seen, keep)),
        next=_commands(path, "train"),
    )


def init_from_recipe(path: Path, name: str, given: Mapping[str, str]) -> InitReport:
    """Write a recipe with the user's own places in it. `require_new` comes before. Raises InputError."""
    text = recipe.text(name, given)
    write(path, config_text.with_schema(text))
    verb = "tune" if "\ntune:" in text else "train"
    return InitReport(
        config=path,
        schema=path.parent / config_text.SCHEMA,
        recipe=name,
        seen=Survey(None, None, None),
        decisions=[],
        warnings=[],
        next=_commands(path, verb),
    )


def _commands(path: Path, verb: str) -> list[str]:
    """Return what can be typed next, as a shell takes it."""
    return [shlex.join(["lora", word, str(path)]) for word in ("check", verb)]


def require_new(path: Path) -> None:
    """Raise ConfigError where a config cannot be written."""
    if path.exists():
        raise ConfigError(f"{path}: already exists; name another file, or delete it.", state=NOTHING_READ)
    if not path.parent.is_dir():
        raise ConfigError(
            f"{path}: the folder {path.parent} does not exist; make it first (mkdir -p {path.parent}).",
            state=NOTHING_READ,
        )


def write(path: Path, text: str) -> None:
    """Write a config, and beside it the schema by which editors check it."""
    with interrupt.patience():  # both files, or none
        storage.write_file(path.parent / config_text.SCHEMA, json.dumps(config_file.json_schema(), indent=1) + "\n")
        storage.write_file(path, text)


def _look(model: str, train: str) -> Generator[Notice | Preparing, None, Survey]:
    """Look at what is here; where that is nothing, torch is not imported for it."""
    missing: list[str] = []
    try:
        has_model = base_folder.find_kept(model) is not None
        if not has_model:
            hint = did_you_mean(Path(model).expanduser(), Path.is_dir)
            missing.append(f"{model} was not fetched yet, so no row is counted in tokens; lora check fetches it.{hint}")
    except ModelError as error:
        has_model = False
        missing.append(error.problems[0])
    has_rows = Path(train).expanduser().exists() or glob.has_magic(train)
    if not has_rows:
        what = "taken for a data set of the hub, and not fetched" if is_hub_id(train) else "not here yet"
        missing.append(f"{train} is {what}, so no row was looked at.{did_you_mean(Path(train).expanduser())}")
    missing += _beside(Path(train).expanduser())
    if not has_model and not has_rows:
        return Survey(None, None, None, missing)
    from lora_cli import survey

    return (yield from survey.survey(model if has_model else None, train if has_rows else None, missing))


def _beside(train: Path) -> Iterator[str]:
    """Say where rows to hold out lie beside the training data."""
    names = (f"{name}{''.join(train.suffixes)}" for name in ("validation", "valid", "val", "dev", "heldout", "eval"))
    if not train.is_file():
        return
    found = next((path for name in names if (path := train.with_name(name)).is_file() and path != train), None)
    if found is not None:
        yield f"{found} lies beside it: data.validation can name it, in the place of a share of the training rows."
