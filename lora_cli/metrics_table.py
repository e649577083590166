"""The measurements of runs as one flat table, a row a record, as CSV or Parquet: for notebooks and spreadsheets.

The columns are always the same, whatever a run measured: `run`, `event` (step or evaluated), and those below, which
are empty where a record has no such figure. Intervals are columns of their own (`forgetting_low`, `forgetting_high`).
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli import metrics, storage
from lora_cli.errors import InputError
from lora_cli.run_dir import RunDir

KINDS = (".csv", ".parquet")
# The columns: name, kind, and where in a record the figure lies.
COLUMNS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "run": (str, ()),
    "event": (str, ("event",)),
    "step": (int, ("step",)),
    "epoch": (float, ("epoch",)),
    "loss": (float, ("loss",)),
    "kl": (float, ("kl",)),
    "targets": (int, ("targets",)),
    "tokens": (int, ("tokens",)),
    "learning_rate": (float, ("learning_rate",)),
    "grad_norm": (float, ("grad_norm",)),
    "seconds": (float, ("seconds",)),
    "token_accuracy": (float, ("token_accuracy",)),
    "improved": (bool, ("improved",)),
    "best_step": (int, ("best_step",)),
    "patience_left": (int, ("patience_left",)),
    "within_budget": (bool, ("within_budget",)),
    "forgetting": (float, ("forgetting", "rise", "value")),
    "forgetting_low": (float, ("forgetting", "rise", "low")),
    "forgetting_high": (float, ("forgetting", "rise", "high")),
    "general_base_loss": (float, ("forgetting", "base_loss")),
    "kl_to_base": (float, ("forgetting", "kl", "value")),
    "kl_to_base_low": (float, ("forgetting", "kl", "low")),
    "kl_to_base_high": (float, ("forgetting", "kl", "high")),
}


def require_kind(path: Path) -> None:
    """Raise InputError where a file's name says neither of the kinds."""
    if path.suffix not in KINDS:
        raise InputError(f"--metrics: {path}: a name that ends with {' or '.join(KINDS)} is expected.")


def write(path: Path, runs: Sequence[tuple[str, RunDir]]) -> None:
    """Write the records of runs, each with its name, in place of a file that is there."""
    rows = [row for name, run in runs for row in _rows(name, run)]
    storage.write_file(path, _csv(rows) if path.suffix == ".csv" else _parquet(rows))


def _rows(name: str, run: RunDir) -> Iterator[dict[str, Any]]:
    for record in metrics.read(run):
        yield {
            column: name if column == "run" else _value(record, kind, keys) for column, (kind, keys) in COLUMNS.items()
        }


def _value(record: Mapping[str, Any], kind: type, keys: Sequence[str]) -> Any:
    """Return a figure of a record, None where it has none of this kind."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is kind else None


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
    schema = pyarrow.schema([(column, kinds[kind]) for column, (kind, _) in COLUMNS.items()])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), sink)
    written: bytes = sink.getvalue().to_pybytes()
    return written
