"""`lora tune --one-at-a-time`: each knob halved and doubled around a config, beside what another seed alone changes."""

import itertools
import math
import statistics
import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli import intervals, run_dir, search_dir, space, storage, tornado
from lora_cli.config import RunConfig
from lora_cli.errors import TrainingStopped
from lora_cli.interrupt import StopRequest
from lora_cli.records import Event, TrialEnded, as_json
from lora_cli.schema import value_of
from lora_cli.search_dir import SearchDir
from lora_cli.search_reports import Knob, SensitivityReport
from lora_cli.tune import open_search

if TYPE_CHECKING:  # torch is imported only once config and rows are good
    from lora_cli.session import Session

KIND = "sensitivity"


def one_at_a_time(
    config: RunConfig, stop: StopRequest, seeds: int = 4, origins: Mapping[str, str] | None = None
) -> Generator[Event, None, SensitivityReport]:
    """Run the config with some seeds, and with each knob at half and at twice its value; return what that changes.

    Other seeds change the order of rows, the adapter's start and dropout; the rows stay split as the config's own
    splits them. What was run before is not run again. Raises UserError.
    """
    search_dir.require_untracked(config)
    place = search_dir.of(config, KIND)
    session = yield from open_search(config, place, stop, origins)
    config = config if config.train.learning_rate != "auto" else (yield from _settled(session, config, place))
    from lora_cli.session import for_trials

    session = for_trials(session)  # once: what it finds of the base is kept
    same, numbers = list[TrialEnded](), itertools.count()
    for number in range(seeds):
        seed = config.seed + number
        same.append(
            (yield from _run(session, config.model_copy(update={"seed": seed}), place, {"seed": seed}, next(numbers)))
        )
    losses = [one.loss for one in same if one.loss is not None and one.state == "finished"]
    if not losses:
        raise TrainingStopped(
            f"{place.path}: training of the config itself stopped with each of {seeds} seeds, so that there is nothing "
            "to hold changes against. A lower train.learning_rate is the usual way out."
        )
    middle, noise = statistics.fmean(losses), _noise(losses)
    knobs = []
    for key, values in space.halved_and_doubled(config).items():
        changes = list[float | None]()
        for value in values:
            ended = yield from _run(session, space.changed(config, {key: value}), place, {key: value}, next(numbers))
            changes.append(ended.loss - middle if ended.state == "finished" and ended.loss is not None else None)
        knobs.append(Knob(key, value_of(config, key), values, changes, _matters(changes, noise)))
    knobs.sort(
        key=lambda knob: max(math.inf if change is None else abs(change) for change in knob.changes), reverse=True
    )
    zero = [key for key in space.knobs(config) if not value_of(config, key)]
    report = SensitivityReport(middle, noise, len(losses), knobs, zero, place.plot, place.report)
    storage.write_file(report.plot, tornado.svg(report))
    storage.write_json(report.saved, as_json(report))
    return report


def _settled(session: "Session", config: RunConfig, place: SearchDir) -> Generator[Event, None, RunConfig]:
    """Return the config with the learning rate that `auto` finds for it."""
    from lora_cli.probe import choose_rate
    from lora_cli.session import with_rate

    return with_rate(config, (yield from choose_rate(session, config, place.as_run)))


def _run(
    session: "Session", config: RunConfig, place: SearchDir, values: Mapping[str, Any], number: int
) -> Generator[Event, None, TrialEnded]:
    """Run one of them, or find what it came to."""
    from lora_cli.trial import Trial

    name = ",".join(f"{key}={value}" for key, value in values.items())
    run = place.named(name)
    with run_dir.held(run):
        trial = Trial(session, config, run, number, values, config.tune.budget, time.perf_counter())
        ended = yield from trial.outcome(None)
    yield ended
    return ended


def _noise(losses: list[float]) -> float | None:
    """Return how far a single run may be from the mean of others that differ in the seed, with a chance of 5 %."""
    if len(losses) < 2:
        return None
    wide = intervals.student(len(losses) - 1) * math.sqrt(1 + 1 / len(losses))
    return wide * statistics.stdev(losses)


def _matters(changes: list[float | None], noise: float | None) -> bool | None:
    """Return whether a knob changes more than another seed does; None where that is not known."""
    if None in changes:
        return True
    return None if noise is None else any(abs(change or 0.0) > noise for change in changes)
