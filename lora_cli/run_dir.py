"""Where a run's files lie, and its memory: config, environment, metrics, status.

output_dir/
  config.yaml  environment.json  metrics.jsonl  run.json  holder.json (while a process holds it)
  start.json          counts of each set of rows, notices, where each value of the config came from
  checkpoints/step-000200/  adapter/ (model/ of lora.method full)  evaluations/
  trackers.json (of train.trackers, which write tensorboard/  wandb/  mlruns/ by themselves)
"""

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_cli import json_file, names, storage
from lora_cli.config import RunConfig
from lora_cli.errors import AdapterError, ConfigError, SurroundingsError, shown
from lora_cli.records import Finished, Start

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
    def start(self) -> Path:
        return self.path / "start.json"

    @property
    def holder(self) -> Path:
        return self.path / "holder.json"

    @property
    def trackers(self) -> Path:
        """What is remembered of the places that the run's figures are sent to."""
        return self.path / "trackers.json"

    @property
    def foreign(self) -> Path:
        """What W&B writes here, with links to logs of its own elsewhere; nothing of it is trusted."""
        return self.path / "wandb"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def result(self, method: str) -> Path:
        """Return where stands what a run of a method makes, when it is finished."""
        return self.model if method == "full" else self.adapter

    @property
    def probes(self) -> Path:
        """Trials of learning rates, gone when `probe` says what came of them."""
        return self.path / "probes"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"


def of(config: RunConfig) -> RunDir:
    """Return the run directory that a config names. Raises ConfigError where that is no path."""
    try:
        config.output_dir.encode()
        return RunDir(Path(config.output_dir).expanduser())
    except (RuntimeError, UnicodeEncodeError) as error:  # ~ of a user whose home is not known; half a character
        reason = shown(error)
        raise ConfigError(f"output_dir: {shown(config.output_dir)} is no path here: {reason}; name another.") from None


def is_run_dir(path: Path) -> bool:
    """Return whether a folder is a run directory of ours."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def require_place(run: RunDir) -> bool:
    """Return whether the folder holds a run of ours. Raises ConfigError where it holds anything else."""
    require_own(run)
    with storage.explained(run.path, "output_dir"):
        there = {p.name for p in run.path.iterdir() if not storage.is_temporary(p)} if run.path.is_dir() else set()
    if is_run_dir(run.path):
        return True
    ours = {run.checkpoints.name, run.environment.name, run.holder.name}  # of one that was killed while it was created
    if found := sorted(there - ours):
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
    values = json_file.read_object(path)
    written = values.get("format", 0)
    if not isinstance(written, int) or written > FORMAT:
        raise AdapterError(
            f"{path}: is of format {shown(written, 20)}, and this version reads those up to {FORMAT}: a newer lora "
            "wrote it. Continue with that one, or set another output_dir."
        )
    return values


def read_text(path: Path) -> str:
    """Return the text of a file of ours, what is no UTF-8 replaced. Raises SurroundingsError."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SurroundingsError(f"{path}: cannot be read: {error.strerror}.") from error


def require_own(run: RunDir) -> None:
    """Raise AdapterError where something inside a run is a link that leads out of it; it is not followed."""
    if problems := [
        f"{link}: is a link that leads out of the run directory, which is not followed; put what it names in its place."
        for link in names.iter_links_out(run.path)
        if run.foreign not in link.parents
    ]:
        raise AdapterError(*problems, state="Nothing was read or written.")


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
        storage.make_folder(run.path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(storage.lock(run.path))
        except AdapterError as error:
            raise AdapterError(f"{error.problems[0]} {_holder(run)}") from None
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")

        def leave() -> None:
            with contextlib.suppress(OSError):  # a folder is not empty
                storage.remove_file(run.holder)
                for folder in made:
                    storage.remove_empty(folder)

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


def warning(run: RunDir) -> str | None:
    """Return what to tell of a run directory that every user of the machine may write to."""
    mode = run.path.stat().st_mode
    if not mode & stat.S_IWOTH:
        return None
    return f"{run.path}: every user of this machine may write here, and could change this run; chmod o-w {run.path}"


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
    facts = {field.name: status.get(field.name) for field in fields(Finished)}
    return json_file.checked(
        Finished, facts | {"adapter": run.model if run.model.exists() else run.adapter}, run.status
    )


def read_start(run: RunDir) -> Start | None:
    """Return what was known of a run before its first step, where it was written down. Raises AdapterError."""
    facts = read_facts(run.start)
    return json_file.checked(Start, facts, run.start) if facts else None


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
