"""The measurements of runs as one flat table, a row a record, as CSV or Parquet: for notebooks and spreadsheets.

The columns are always the same, whatever a run measured: `run`, and those of `metrics.table`, which are empty where a
record has no such figure.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli import metrics, storage
from lora_cli.errors import InputError
from lora_cli.run_dir import RunDir

KINDS = (".csv", ".parquet")
_KNOWN_BY = 3  # the first columns, which stay
COLUMNS: Mapping[str, type] = {"run": str, **metrics.COLUMNS}


def require_place(path: Path) -> None:
    """Raise InputError where a file's name says neither of the kinds, or one is there that is no such table."""
    if path.suffix not in KINDS:
        raise InputError(f"--metrics: {path}: a name that ends with {' or '.join(KINDS)} is expected.")
    if path.exists() and _first_columns(path) != list(COLUMNS)[:_KNOWN_BY]:
        raise InputError(f"--metrics: {path} is there and was not written by lora report; name another file.")


def _first_columns(path: Path) -> list[str]:
    """Return the columns by which a table is known; none where a file is no table."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return next(csv.reader(file), [])[:_KNOWN_BY]
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names[:_KNOWN_BY])
    except (ValueError, csv.Error, IsADirectoryError):
        return []


def write(path: Path, runs: Sequence[tuple[str, RunDir]]) -> None:
    """Write the records of runs, each with its name; `require_place` comes before."""
    rows = [{"run": name, **row} for name, run in runs for row in metrics.table(run)]
    storage.write_file(path, _csv(rows) if path.suffix == ".csv" else _parquet(rows))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow  # only here: a page needs nothing of it
    import pyarrow.parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(column, kinds[kind]) for column, kind in COLUMNS.items()])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), sink)
    written: bytes = sink.getvalue().to_pybytes()
    return written
