"""Where a run's files lie, and its memory: config, environment, metrics, status.

output_dir/
  config.yaml  environment.json  metrics.jsonl  run.json  holder.json (while a process holds it)
  checkpoints/step-000200/  adapter/  evaluations/
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_cli import storage
from lora_cli.config import RunConfig
from lora_cli.errors import AdapterError, ConfigError
from lora_cli.records import Estimate, Evaluated, Finished, Forgetting, StepDone, Tested, as_json, event_name

FORMAT = 1  # of run.json, environment.json and a checkpoint's state.json; those without one are older, and read


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
    def holder(self) -> Path:
        return self.path / "holder.json"

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
    """Return the run directory that a config names. Raises ConfigError."""
    try:
        config.output_dir.encode()
        return RunDir(Path(config.output_dir).expanduser())
    except (RuntimeError, UnicodeEncodeError) as error:  # ~ of a user whose home is not known; half a character
        raise ConfigError(f"output_dir: {config.output_dir[:80]!r} is no path here: {error}") from None


def is_run_dir(path: Path) -> bool:
    """Return whether a folder is a run directory of ours."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def require_place(run: RunDir) -> bool:
    """Return whether the folder holds a run of ours. Raises ConfigError where it holds anything else."""
    with storage.explained(run.path):
        names = {p.name for p in run.path.iterdir() if not storage.is_temporary(p)} if run.path.is_dir() else set()
    if is_run_dir(run.path):
        return True
    ours = {
        run.checkpoints.name,
        run.environment.name,
        run.holder.name,
    }  # of a run that was killed while it was created
    if found := sorted(names - ours):
        foreign = [name for name in found if name.startswith("checkpoint-")]
        raise ConfigError(
            f"output_dir: {run.path} holds other files ({', '.join(found[:5])}); name another folder.",
            *(f"{name} is a checkpoint of another tool, which cannot be continued here." for name in foreign[:1]),
        )
    return False


def read_facts(path: Path) -> dict[str, Any]:
    """Return a JSON file of ours, empty when there is none. Raises AdapterError where this version cannot read it."""
    if not path.exists():
        return {}
    try:
        values = json.loads(storage.read_text(path))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read: {str(error)[:120]}. Put it back as it was.") from None
    written = values.get("format", 0) if isinstance(values, dict) else None
    if not isinstance(written, int) or written > FORMAT:
        raise AdapterError(
            f"{path}: is of format {str(written)[:20]}, and this version reads those up to {FORMAT}: a newer lora "
            "wrote it. Continue with that one, or set another output_dir."
        )
    return dict(values)


def read_environment(run: RunDir) -> dict[str, Any]:
    """Return environment.json, empty when there is none. Raises AdapterError."""
    return read_facts(run.environment)


@contextlib.contextmanager
def held(run: RunDir) -> Iterator[Callable[[], None]]:
    """Hold the run directory for this process; what is yielded leaves it, as does the end of the block.

    Folders that had to be made go again where nothing was written into them. Raises AdapterError where another process
    holds it.
    """
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    with storage.explained(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(storage.lock(run.path))
        except AdapterError as error:
            raise AdapterError(f"{error.problems[0]} {_holder(run)}") from None
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")

        def leave() -> None:
            with contextlib.suppress(OSError):  # a folder is not empty
                run.holder.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()

        try:
            storage.write_json(run.holder, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
            yield leave
        finally:
            leave()


def _holder(run: RunDir) -> str:
    """Return who holds a run directory, in words; a file that a killed process left names no one."""
    for _ in range(10):  # it is written just after the lock is taken
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(run.holder.read_text(encoding="utf-8"))
            if found["host"] == socket.gethostname():
                os.kill(int(found["pid"]), 0)
            return f"It is process {found['pid']} on {found['host']}, since {found['started']}."
        time.sleep(0.05)
    return "It does not say which."


def append(run: RunDir, record: StepDone | Evaluated) -> None:
    """Append one measurement to metrics.jsonl."""
    storage.append_line(run.metrics, json.dumps({"event": event_name(record), **as_json(record)}))


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; a last line cut short by a kill, and lines that are not ours, left out."""
    return [record for record in _lines(run) if record is not None]


def _lines(run: RunDir) -> list[dict[str, Any] | None]:
    """Return the lines of metrics.jsonl as records, None for what is none."""
    if not run.metrics.exists():
        return []
    records: list[dict[str, Any] | None] = []
    for line in storage.read_text(run.metrics).splitlines():
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        is_ours = isinstance(record, dict) and isinstance(record.get("step"), int) and "event" in record
        records.append(record if is_ours else None)
    return records


def rewind_metrics(run: RunDir, step: int) -> Iterator[str]:
    """Forget what was measured after a step, as those steps are about to be taken again.

    Iterates over what was wrong with the rest: it holds each step once afterwards, except for those that are lost.
    """
    lines = _lines(run)
    if foreign := lines.count(None):
        yield f"{run.metrics}: {foreign} lines are cut short or no measurements of a run, and were taken out."
    before = [record for record in lines if record is not None and record["step"] <= step]
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


def sync_metrics(run: RunDir) -> None:
    """Have what was measured on the disk; a checkpoint that appears after this never knows more than metrics.jsonl."""
    if run.metrics.exists():
        with storage.explained(run.metrics):
            storage.sync(run.metrics)


def write_status(run: RunDir, status: str, **facts: Any) -> None:
    """Write run.json: running | finished | stopped | failed, with what is known; `changes` stay as they are there."""
    before = read_status(run)
    kept = {"changes": before["changes"]} if "changes" in before else {}
    storage.write_json(run.status, {"format": FORMAT, "status": status, **kept, **facts})


def read_status(run: RunDir) -> dict[str, Any]:
    """Return run.json, empty when there is none. Raises AdapterError."""
    return read_facts(run.status)


def read_finished(run: RunDir) -> Finished | None:
    """Return how a run ended, when it is finished."""
    status = read_status(run)
    if status.get("status") != "finished":
        return None
    facts: dict[str, Any] = {field.name: status.get(field.name) for field in fields(Finished)}
    test = facts["test"] and Tested(
        **facts["test"] | {name: Estimate(**facts["test"][name]) for name in ("change", "flattery")}
    )
    return Finished(**facts | {"adapter": run.adapter, "test": test})


def read_evaluated(run: RunDir) -> dict[int, Evaluated]:
    """Return the validation passes of metrics.jsonl by their step."""
    found = {}
    for record in read_metrics(run):
        if record.get("event") == "evaluated":
            facts: dict[str, Any] = {field.name: record.get(field.name) for field in fields(Evaluated)}
            if (forgetting := facts["forgetting"]) is not None:
                estimates = {name: Estimate(**forgetting[name]) for name in ("rise", "kl")}
                facts["forgetting"] = Forgetting(**forgetting | estimates)
            found[record["step"]] = Evaluated(**facts)
    return found


def step_folders(run: RunDir) -> Sequence[tuple[int, Path]]:
    """Return (step, checkpoint folder), newest first, valid or not."""
    found = [(p.name.removeprefix("step-"), p) for p in run.checkpoints.glob("step-*") if p.is_dir()]
    return sorted(((int(number), p) for number, p in found if number.isdecimal()), reverse=True)


def foreign_folders(run: RunDir) -> list[Path]:
    """Return what lies beside the checkpoints and is none of ours: transformers' `checkpoint-500`, a renamed one."""
    ours = {folder for _, folder in step_folders(run)}
    return sorted(p for p in run.checkpoints.iterdir() if p not in ours and not storage.is_temporary(p))


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
            + (f"Its checkpoints can be used: {', '.join(steps[:3])}." if steps else "It has no checkpoint either."),
            state="Nothing was read.",
        )
    what = "is neither a run directory nor an adapter (no adapter_config.json)" if path.is_dir() else "does not exist"
    raise AdapterError(f"{path}: {what}.", state="Nothing was read.")


def _require_whole(folder: Path) -> None:
    """Raise AdapterError when a folder of ours is not as it was written; others have no manifest."""
    if (folder / storage.MANIFEST).is_file() and (problems := storage.problems_in(folder)):
        raise AdapterError(*problems, state="Nothing was read.")
