"""train.trackers: the events of a run, passed on, and what they measure recorded elsewhere too.

metrics.jsonl is the run's memory and a tracker a copy of it: what a tracker lacks when a run begins or goes on is taken
from there, each step once. A tracker works in a thread of its own; one that fails is left alone, and the run goes on.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, TypeVar, assert_never

from lora_cli import json_file, launch, metrics, run_dir, storage
from lora_cli.config import RunConfig, TrackerName
from lora_cli.errors import NOTHING_READ, Interrupted, SurroundingsError, UserError, shown
from lora_cli.records import Evaluated, Event, Finished, Notice, Saved, Started, StepDone, as_json, event_name
from lora_cli.redact import redact
from lora_cli.run_dir import RunDir
from lora_cli.schema import flat
from lora_cli.trackers.recorder import LONGEST_END_SECONDS, Recorder, Row
from lora_cli.trackers.tracker import NEW, Known, TrackedRun, Tracker

Result = TypeVar("Result")

# What is recorded under which name: the record's name in metrics.jsonl and its fields, inner ones with dots.
_NAMES = {
    "step": {f"train/{name}": name for name in ("loss", "kl", "learning_rate", "grad_norm", "epoch")},
    "evaluated": {
        **{f"validation/{name}": name for name in ("loss", "token_accuracy")},
        "forgetting/rise": "forgetting.rise.value",
        "forgetting/kl": "forgetting.kl.value",
    },
    "finished": {
        **{f"best/{name}": f"best_{name}" for name in ("loss", "step", "forgetting")},
        "base/loss": "base_loss",
        **{f"test/{name}": f"test.{name}" for name in ("loss", "base_loss")},
        "test/change": "test.change.value",
    },
}


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what trackers get of a record as it stands in metrics.jsonl; what was not measured is left out."""
    found = {}
    for name, path in _NAMES[record["event"]].items():
        value: Any = record
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if json_file.is_number(value):
            found[name] = float(value)
    tokens, seconds = record.get("tokens"), record.get("seconds")
    if record["event"] == "step" and json_file.is_number(tokens) and json_file.is_number(seconds) and seconds:
        found["train/tokens_per_second"] = tokens / seconds
    return found


def require(config: RunConfig) -> None:
    """Raise SurroundingsError where a tracker's package or login is missing, with all that are."""
    problems = []
    for name in config.train.trackers:
        try:
            if name == "wandb":
                from lora_cli.trackers import wandb

                problem = wandb.problem()
                problems += [f"train.trackers: wandb: {problem}."] if problem else []
            else:
                _kind_of(name)
        except ImportError as error:
            problems.append(
                f"train.trackers: {name} is not installed, or cannot be imported ({shown(error)}): "
                f"pip install 'lora-cli[{name}]'."
            )
    if problems:
        raise SurroundingsError(*problems, state=NOTHING_READ)


def _kind_of(name: TrackerName) -> Callable[[TrackedRun], Tracker]:
    """Return how a tracker is made; only here its library is imported. Raises ImportError."""
    match name:
        case "tensorboard":
            from lora_cli.trackers.tensorboard import TensorBoard

            return TensorBoard
        case "wandb":
            from lora_cli.trackers.wandb import WeightsAndBiases

            return WeightsAndBiases
        case "mlflow":
            from lora_cli.trackers.mlflow import Mlflow

            return Mlflow
        case _:
            assert_never(name)


@dataclass(frozen=True)
class Remembered:
    """What trackers.json holds."""

    tensorboard: Known = NEW
    wandb: Known = NEW
    mlflow: Known = NEW


@dataclass
class Tracking:
    """The trackers of one run, and the row of the step that is under way."""

    run: RunDir
    recorders: Mapping[TrackerName, Recorder]
    remembered: Remembered
    row: Row | None

    def take(self, event: Event) -> Iterator[Notice]:
        """Record an event; iterate over what is to be said. A step's row is recorded when the next one begins."""
        match event:
            case StepDone() | Evaluated() | Finished():
                if self.row is not None and self.row[0] != event.step:
                    self._record()
                values = figures({"event": event_name(event), **as_json(event)})
                self.row = (event.step, {**(self.row[1] if self.row else {}), **values})
                if isinstance(event, Finished):
                    yield from self.end("finished", event.reason)
            case Saved():
                for recorder in self.recorders.values():
                    recorder.flush()
        self.remember()
        yield from self._news()

    def end(self, status: str, reason: str) -> Iterator[Notice]:
        """End all, together; of a step that was interrupted the row comes when the run goes on."""
        if status != "stopped":
            self._record()
        for recorder in self.recorders.values():
            recorder.flush()
            recorder.end(status, redact(reason))
        until = time.monotonic() + LONGEST_END_SECONDS
        for recorder in self.recorders.values():
            recorder.wait(until)
        yield from self._news()

    def _record(self) -> None:
        if self.row is not None:
            for recorder in self.recorders.values():
                recorder.record(*self.row)
        self.row = None

    def remember(self) -> None:
        """Write down what changed; only while the run's directory is held."""
        known = {str(name): recorder.known for name, recorder in self.recorders.items()}
        if (now := replace(self.remembered, **known)) != self.remembered:
            self.remembered = now
            with contextlib.suppress(UserError):  # a full disk is for the run to say
                storage.write_json(self.run.trackers, {"format": run_dir.FORMAT, **asdict(now)})

    def _news(self) -> Iterator[Notice]:
        for recorder in self.recorders.values():
            yield from recorder.news()


def tracked(
    events: Generator[Event, None, Result], config: RunConfig, name: str = ""
) -> Generator[Event, None, Result]:
    """Pass a run's events on, and record them with its trackers; return what comes of them.

    `name` is the run's where it is not that of its folder. Only the main process of several records.
    """
    if not config.train.trackers or not launch.is_main():
        return (yield from events)
    tracking: Tracking | None = None
    with contextlib.closing(events):
        try:
            while True:
                event = next(events)
                if isinstance(event, Started):
                    tracking = yield from _begin(config, run_dir.of(config), event, name)
                if tracking is not None:
                    yield from tracking.take(event)
                yield event
        except StopIteration as end:
            result: Result = end.value
            return result
        except BaseException as error:
            if tracking is not None:
                status = "stopped" if isinstance(error, Interrupted | GeneratorExit | KeyboardInterrupt) else "failed"
                said = list(tracking.end(status, error.problems[0] if isinstance(error, UserError) else ""))
                if not isinstance(error, GeneratorExit):
                    yield from said
            raise


def _begin(config: RunConfig, run: RunDir, started: Started, name: str) -> Generator[Notice, None, Tracking]:
    """Begin with the rows that the run has already; that of the step it stands at may not be whole."""
    rows: dict[int, dict[str, float]] = {}
    for record in metrics.read(run):
        if record["event"] in _NAMES and record["step"] <= started.step:
            rows.setdefault(record["step"], {}).update(figures(record))
    last = rows.pop(started.step, None)
    remembered = yield from _remembered(run)
    recorders: dict[TrackerName, Recorder] = {}
    for kind in config.train.trackers:
        before: Known = getattr(remembered, kind)
        known = Known(before.id or secrets.token_hex(4), before.step)
        tracked_run = TrackedRun(run.path, name or run.path.absolute().name, _settings(config), known)
        recorders[kind] = Recorder(kind, _kind_of(kind)(tracked_run), known)
    tracking = Tracking(run, recorders, remembered, None if last is None else (started.step, last))
    tracking.remember()
    for recorder in recorders.values():
        recorder.start(started.step, sorted(rows.items()))
    return tracking


def _remembered(run: RunDir) -> Generator[Notice, None, Remembered]:
    try:
        return json_file.checked(Remembered, run_dir.read_facts(run.trackers), run.trackers)
    except UserError as error:
        yield Notice(f"{error.problems[0]} What is tracked of this run begins anew.")
        return Remembered()


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return every key of a config with its value: a number, true or false, null, or a text without secrets."""
    values = config.model_dump(mode="json")
    settings: dict[str, Any] = {}
    for key, _ in flat(config):
        value: Any = reduce(lambda section, part: section[part], key.split("."), values)
        if isinstance(value, list | dict):
            value = json.dumps(value, ensure_ascii=False)
        settings[key] = redact(value) if isinstance(value, str) else value
    return settings
