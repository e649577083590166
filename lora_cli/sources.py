"""Files, folders and hub data sets -> rows, each with its place (`train.jsonl:12`)."""

import csv
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import NOTHING_LOADED, DataError, SurroundingsError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Broken:
    """A line that is no row; it is reported together with the others."""

    problem: str


def _rows_of_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = _parse_json(line.rstrip(), path, number)
                except DataError as error:
                    row = Broken(str(error))
                yield f"{path}:{number}", row


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f'{path}:{first_line}: the key "{twice}" stands twice.', state=NOTHING_LOADED)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}:{error.colno}"
        raise DataError(f"{place}: this is not JSON: {error.msg}.", state=NOTHING_LOADED) from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: the JSON is nested too deeply.", state=NOTHING_LOADED) from None


def _rows_of_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] == "{" and "\n" in text.strip():
        try:
            json.loads(text)
        except json.JSONDecodeError:  # not one object: a file of lines under the wrong name
            yield from _rows_of_jsonl(path)
            return
    rows = _parse_json(text, path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(rows).__name__}.", state=NOTHING_LOADED)
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _rows_of_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: has not as many fields as the header.", state=NOTHING_LOADED)
                yield where, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: this is not CSV: {error}.", state=NOTHING_LOADED) from None


def _rows_of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise many kinds for a broken file
        raise DataError(f"{path}: this is not parquet: {str(error)[:200]}", state=NOTHING_LOADED) from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _rows_of_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split)
    except FileNotFoundError as error:  # of which datasets' DatasetNotFoundError is one
        raise DataError(
            f'data: "{name}" is no file here, and no data set that the hub shows: {str(error)[:200]}',
            state=NOTHING_LOADED,
        ) from None
    except (ConnectionError, OSError) as error:
        raise SurroundingsError(
            f'data: "{name}" is no file here, and as a hub data set it cannot be reached: {str(error)[:200]}',
            state=NOTHING_LOADED,
        ) from None
    except Exception as error:  # the hub client raises many kinds for a name or split that is not there
        raise DataError(
            f'data: the hub data set "{name}" cannot be read: {str(error)[:300]}', state=NOTHING_LOADED
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{split}]: row {number}", row


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    match path.suffix:
        case ".jsonl":
            return _rows_of_jsonl
        case ".json":
            return _rows_of_json
        case ".csv":
            return _rows_of_csv
        case ".parquet":
            return _rows_of_parquet
    raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}.", state=NOTHING_LOADED)


def iter_rows(source: str, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Iterate over (place, row) of a file, a folder of files or a hub data set. Raises DataError, SurroundingsError."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path}: this folder has no {', '.join(SUFFIXES)} file.", state=NOTHING_LOADED)
    elif path.is_file():
        files = [path]
    elif is_hub_id(source):
        yield from _rows_of_hub(source, split)
        return
    else:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" Paths are read from {Path.cwd()}."
        raise DataError(f"{source}: no such file.{hint}", state=NOTHING_LOADED)
    for file in files:
        try:
            yield from _reader(file)(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text (byte {error.start}).", state=NOTHING_LOADED) from None
        except OSError as error:
            raise SurroundingsError(f"{file}: cannot be read: {error.strerror}.", state=NOTHING_LOADED) from None


def is_hub_id(source: str) -> bool:
    """Return whether a source can only be a hub data set: no file or folder here, and not spelt like one."""
    path = Path(source).expanduser()
    spelt_as_path = path.suffix in SUFFIXES or source.startswith(("/", ".", "~")) or source.count("/") > 1
    return not path.exists() and not spelt_as_path
