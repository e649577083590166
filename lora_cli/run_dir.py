"""Where a run's files lie, and its memory: config, environment, metrics, status.

output_dir/
  config.yaml  environment.json  metrics.jsonl  run.json
  checkpoints/step-000200/  adapter/  evaluations/
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_cli import config_file, json_file, storage
from lora_cli.config import RunConfig, differences
from lora_cli.errors import AdapterError, ConfigError, DataError, shown
from lora_cli.records import Evaluated, Finished, StepDone, as_json, event_name


@dataclass(frozen=True)
class RunDir:
    """The layout of one run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"


def of(config: RunConfig) -> RunDir:
    """Return the run directory that a config names. Raises ConfigError where that can be none."""
    try:
        path = Path(config.output_dir).expanduser()
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
    except (OSError, RuntimeError) as error:  # a name too long for the system, or ~ of a user it does not know
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"output_dir: {shown(config.output_dir)} can be no folder: {reason}; name another.") from None
    if not there.is_dir():
        raise ConfigError(f"output_dir: {there} is a file, so {path} can be no folder; name another.")
    return RunDir(path)


def is_run_dir(path: Path) -> bool:
    """Return whether a folder is a run directory of ours."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def require_usable(run: RunDir, config: RunConfig) -> None:
    """Raise ConfigError unless the folder is free or holds a run of the same config."""
    if not run.path.exists():
        return
    if not is_run_dir(run.path):
        ours = {run.checkpoints.name, run.environment.name}  # of a run that was killed while it was created
        names = {p.name for p in run.path.iterdir() if not storage.is_temporary(p)}
        if found := sorted(names - ours):
            raise ConfigError(
                f"output_dir: {run.path} holds other files ({', '.join(found[:5])}); name another folder."
            )
        return
    if changed := differences(config_file.load(run.config), config):
        raise ConfigError(
            f"output_dir: {run.path} holds a run of another config:",
            *(f"  {line}" for line in changed),
            "To go on with that run, use its config; to start anew, set another output_dir (output_dir=...).",
        )


def create(run: RunDir, config: RunConfig, environment: dict[str, Any]) -> None:
    """Create the run directory, or check that an existing one saw the same base and data. Raises DataError."""
    if run.environment.exists():
        before = read_environment(run)
        changed = [
            f"{run.path}: the {what} changed since this run began ({before.get(key)} then, {environment[key]} now)."
            for key, what in (("base_fingerprint", "base model"), ("data_fingerprint", "data, tokenizer or template"))
            if before.get(key) != environment[key]
        ]
        if changed:
            raise DataError(*changed, "Put it back to continue, or start anew with another output_dir.")
    else:
        with storage.explained(run.path):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        storage.write_json(run.environment, environment)
    if not run.config.exists():
        storage.write_file(run.config, config_file.dump(config))


def read_environment(run: RunDir) -> dict[str, Any]:
    """Return environment.json, empty when there is none."""
    if not run.environment.exists():
        return {}
    return json_file.read_object(run.environment)


@contextlib.contextmanager
def held(run: RunDir) -> Iterator[None]:
    """Hold the run directory for this process and sweep what a killed one left."""
    with storage.explained(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with storage.lock(run.path):
        storage.sweep(run.path)
        storage.sweep(run.checkpoints)
        yield


def append(run: RunDir, record: StepDone | Evaluated) -> None:
    """Append one measurement to metrics.jsonl."""
    storage.append_line(run.metrics, json.dumps({"event": event_name(record), **as_json(record)}))


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; a line that is none, as the last one cut short by a kill, is left out."""
    if not run.metrics.exists():
        return []
    records = []
    for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def rewind_metrics(run: RunDir, step: int) -> None:
    """Forget what was measured after a step: those steps are about to be taken again."""
    kept = [record for record in read_metrics(run) if record["step"] <= step]
    storage.write_file(run.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def write_status(run: RunDir, status: str, **facts: Any) -> None:
    """Write run.json: running | finished | stopped | failed, with what is known."""
    storage.write_json(run.status, {"status": status, **facts})


def read_status(run: RunDir) -> dict[str, Any]:
    """Return run.json, empty when there is none."""
    if not run.status.exists():
        return {}
    return json_file.read_object(run.status)


def read_finished(run: RunDir) -> Finished | None:
    """Return how a run ended, when it is finished."""
    status = read_status(run)
    if status.get("status") != "finished":
        return None
    facts = {field.name: status.get(field.name) for field in fields(Finished)}
    return json_file.checked(Finished, facts | {"adapter": run.adapter}, run.status)


def read_evaluated(run: RunDir) -> dict[int, Evaluated]:
    """Return the validation passes of metrics.jsonl by their step."""
    found = {}
    for record in read_metrics(run):
        if record.get("event") == "evaluated":
            facts = {field.name: record.get(field.name) for field in fields(Evaluated)}
            found[record["step"]] = json_file.checked(Evaluated, facts, run.metrics)
    return found


def step_folders(run: RunDir) -> Sequence[tuple[int, Path]]:
    """Return (step, checkpoint folder), newest first, valid or not."""
    found = [(p.name.removeprefix("step-"), p) for p in run.checkpoints.glob("step-*") if p.is_dir()]
    return sorted(((int(number), p) for number, p in found if number.isdecimal()), reverse=True)


def checkpoint_path(run: RunDir, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run.checkpoints / f"step-{step:06d}"


def find_adapter(path: Path) -> tuple[Path, RunDir | None]:
    """Return the adapter folder that RUN names, and the run it belongs to.

    RUN is a run directory (its finished adapter), a checkpoint, or any PEFT adapter folder. Raises AdapterError.
    """
    if (path / "adapter_config.json").is_file():
        _require_whole(path)
        above = [parent for parent in (path.parent, path.parent.parent) if is_run_dir(parent)]
        return path, RunDir(above[0]) if above else None
    if is_run_dir(path):
        run = RunDir(path)
        if (run.adapter / "adapter_config.json").is_file():
            _require_whole(run.adapter)
            return run.adapter, run
        steps = [str(folder) for _, folder in step_folders(run)]
        raise AdapterError(
            f"{path}: this run is not finished, so it has no adapter/ yet. "
            + (f"Its checkpoints can be used: {', '.join(steps[:3])}." if steps else "It has no checkpoint either.")
            + f" `lora train {run.config}` goes on with it.",
            state="Nothing was read.",
        )
    what = "is neither a run directory nor an adapter (no adapter_config.json)" if path.exists() else "does not exist"
    raise AdapterError(
        f"{path}: {what}; name a run directory, a checkpoint or an adapter folder.", state="Nothing was read."
    )


def _require_whole(folder: Path) -> None:
    """Raise AdapterError when a folder of ours is not as it was written; others have no manifest."""
    if (folder / storage.MANIFEST).is_file() and (problems := storage.problems_in(folder)):
        way_out = "The folder is not as it was written: copy it again, or use another checkpoint."
        raise AdapterError(*problems, way_out, state="Nothing was read.")
