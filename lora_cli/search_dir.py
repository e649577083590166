"""Where the files of a search lie, beside the run that its config names; several processes may be at work in it.

OUTPUT_DIR-tune/
  config.yaml  environment.json      what is searched around, on which base and rows
  study.log                          Optuna's journal (unless tune.storage names another place)
  trials/0000/ ...                   a run each; checkpoints are gone when it has ended
  best.yaml  best/                   the best config, and its run on all steps
  tune.json                          the report

OUTPUT_DIR-sensitivity/ is the same for --one-at-a-time, its runs named by what they change, with tornado.svg.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli import config_file, launch, resume, room, run_dir, storage
from lora_cli.config import RunConfig
from lora_cli.errors import AdapterError, ConfigError
from lora_cli.run_dir import RunDir

KINDS = ("tune", "sensitivity", "against-full")  # OUTPUT_DIR-tune, ...
_ATTEMPTS = 50  # to be alone in it for a moment


@dataclass(frozen=True)
class SearchDir:
    """The layout of one search."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "study.log"

    @property
    def best_config(self) -> Path:
        return self.path / "best.yaml"

    @property
    def best(self) -> RunDir:
        return RunDir(self.path / "best")

    @property
    def report(self) -> Path:
        return self.path / "tune.json"

    @property
    def plot(self) -> Path:
        return self.path / "tornado.svg"

    @property
    def as_run(self) -> RunDir:
        """The folder as if it were a run's: its environment.json is one."""
        return RunDir(self.path)

    def trial(self, number: int) -> RunDir:
        """Return where the run of a trial lies."""
        return self.named(f"{number:04d}")

    def named(self, name: str) -> RunDir:
        """Return where a run of this name lies."""
        return RunDir(self.path / "trials" / name)


def of(config: RunConfig, kind: str = "tune") -> SearchDir:
    """Return the search directory of a config."""
    place = run_dir.of(config).path
    return SearchDir(place.with_name(f"{place.name}-{kind}"))


def require_ready(config: RunConfig, place: SearchDir, alone: str) -> None:
    """Raise UserError where what a search needs is not there; `alone` says why one process is to start it."""
    from lora_cli import data  # only here: what reads a search pays for no pyarrow

    launch.require_alone(alone)
    if config.data.validation == 0:
        raise ConfigError("data.validation: is 0, and runs are held against each other by validation loss.")
    _require_place(config, place)
    data.require_readable(config.data, config.eval.general_source)
    room.require_writable(place.path, "output_dir")


def require_untracked(config: RunConfig) -> None:
    """Raise ConfigError where runs are to be tracked that are not."""
    if config.train.trackers:
        raise ConfigError("train.trackers: these runs are not tracked; add train.trackers=[] to the command.")


def _require_place(config: RunConfig, place: SearchDir) -> None:
    """Raise ConfigError where a folder holds anything but a search around the same config, however many trials."""
    run_dir.require_own(place.as_run)
    if place.config.is_file():
        changes = resume.changes(config_file.load(place.config), config)
        if other := [change for change in changes if change.key not in ("tune.trials", "tune.storage", "output_dir")]:
            raise ConfigError(
                f"{place.path}: holds a search around another config:",
                *(f"  {change}" for change in other),
                "To go on with that search, use its config. To start anew, set another output_dir.",
            )
        return
    there = place.path.iterdir() if place.path.is_dir() else ()
    names = sorted(p.name for p in there if not storage.is_temporary(p))
    if found := [name for name in names if name != place.as_run.environment.name]:  # of one that is being begun
        raise ConfigError(f"{place.path}: holds other files ({', '.join(found[:5])}); name another output_dir.")


def create(config: RunConfig, place: SearchDir, environment: Mapping[str, Any]) -> None:
    """Write down what is searched around, and on what, where no other process did before.

    In the environment is a name for this folder, by which processes know whether they work in the same.
    """
    with storage.explained(place.path):
        storage.make_folder(place.path)
    for left in reversed(range(_ATTEMPTS)):
        try:
            with storage.lock(place.path):
                if not place.config.is_file():
                    known = {"format": run_dir.FORMAT, **environment, "search": uuid.uuid4().hex}
                    storage.write_json(place.as_run.environment, known)
                    storage.write_file(place.config, config_file.dump(config))
                return
        except AdapterError:
            if not left:
                raise
            time.sleep(0.1)
