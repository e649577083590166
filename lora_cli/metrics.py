"""metrics.jsonl: what was measured, one line each, appended as it happens and mended before a run goes on."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from io import FileIO
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from lora_cli import json_file, run_dir, storage
from lora_cli.errors import AdapterError
from lora_cli.records import Evaluated, StepDone, as_json, event_name
from lora_cli.run_dir import RunDir

Record = TypeVar("Record")
_KINDS: dict[str, type[StepDone] | type[Evaluated]] = {"step": StepDone, "evaluated": Evaluated}


def append(file: FileIO, record: StepDone | Evaluated) -> None:
    """Append one measurement to metrics.jsonl."""
    storage.append_line(file, json.dumps({"event": event_name(record), **as_json(record)}))


def read(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; a last line cut short by a kill, and lines that are not ours, left out."""
    return [record for record in _lines(run) if record is not None]


def _lines(run: RunDir) -> list[dict[str, Any] | None]:
    """Return the lines of metrics.jsonl as records, None for what is none."""
    if not run.metrics.exists():
        return []
    records: list[dict[str, Any] | None] = []
    for line in run_dir.read_text(run.metrics).splitlines():
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        is_ours = (
            isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("event"), str)
        )
        records.append(record if is_ours else None)
    return records


def _leaves(record: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Iterate over the keys of a record and what they hold, those of records inside it joined by dots."""
    for name, hint in get_type_hints(record).items():
        kinds = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and one is not NoneType]
        if is_dataclass(kinds[0]):
            yield from _leaves(kinds[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kinds[0]


# event, then what every step has, then what only a validation pass has: forgetting.rise.value, ...
COLUMNS: Mapping[str, type] = {"event": str, **dict(_leaves(StepDone)), **dict(_leaves(Evaluated))}


def table(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl as flat rows, all with `COLUMNS`, None where a record has no such value.

    That is what `pandas.DataFrame` and `csv.DictWriter` take as it is.
    """
    return [{column: _figure(record, column, kind) for column, kind in COLUMNS.items()} for record in read(run)]


def _figure(record: Any, column: str, kind: type) -> Any:
    """Return a figure of a record, None where it has none of this kind."""
    for key in column.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    if kind is float and type(record) is int:
        return float(record)
    return record if type(record) is kind else None


def rewind(run: RunDir, step: int, evaluated: bool = True) -> Iterator[str]:
    """Forget what was measured after a step, as those steps are about to be taken again.

    Without `evaluated` the step's own validation is to be done again too. Iterates over what was wrong with the rest:
    it holds each step once afterwards, except for those that are lost.
    """
    lines = _lines(run)
    if foreign := lines.count(None):
        yield f"{run.metrics}: {foreign} lines are cut short or no measurements of a run, and were taken out."
    before = [
        record
        for record in lines
        if record is not None
        and (record["step"] < step or (record["step"] == step and (evaluated or record["event"] == "step")))
    ]
    kept = list({(record["event"], record["step"]): record for record in before}.values())
    if len(kept) < len(before):
        yield f"{run.metrics}: {len(before) - len(kept)} lines stood there twice, and were taken out."
    lost = sorted(set(range(1, step + 1)) - {record["step"] for record in kept if record["event"] == "step"})
    if lost:
        yield (
            f"{run.metrics}: the measurements of {len(lost)} steps up to the checkpoint are lost (the first is step "
            f"{lost[0]}), as after a power cut. What is trained is not touched by it."
        )
    storage.write_file(run.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def keep(run: RunDir) -> None:
    """Have what was measured on the disk; a checkpoint that appears after this never knows more than metrics.jsonl."""
    if run.metrics.exists():
        storage.keep(run.metrics)


def read_evaluated(run: RunDir) -> dict[int, Evaluated]:
    """Return the validation passes of metrics.jsonl by their step."""
    found = {}
    for record in read(run):
        if record.get("event") == "evaluated":
            found[record["step"]] = _as(Evaluated, record, run)
    return found


def read_measured(run: RunDir) -> list[StepDone | Evaluated]:
    """Return the records of metrics.jsonl, in their order, to be looked at; those that are damaged are left out."""
    measured = list[StepDone | Evaluated]()
    for record in read(run):
        if (kind := _KINDS.get(str(record["event"]))) is not None:
            with contextlib.suppress(AdapterError):
                measured.append(_as(kind, record, run))
    return measured


def _as(kind: type[Record], record: dict[str, Any], run: RunDir) -> Record:
    facts = {field.name: record.get(field.name) for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    return json_file.checked(kind, facts, run.metrics)
