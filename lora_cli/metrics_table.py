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
COLUMNS: Mapping[str, type] = {"run": str, **metrics.COLUMNS}


def require_kind(path: Path) -> None:
    """Raise InputError where a file's name says neither of the kinds."""
    if path.suffix not in KINDS:
        raise InputError(f"--metrics: {path}: a name that ends with {' or '.join(KINDS)} is expected.")


def write(path: Path, runs: Sequence[tuple[str, RunDir]]) -> None:
    """Write the records of runs, each with its name, in place of a file that is there."""
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
