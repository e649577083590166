"""`train.learning_rate: auto`: some rates tried on a share of the run, on the base that is in memory.

Each trial is a whole run of its own with a schedule of its own: the loss that a rate has in the middle of a longer run
says little, because high rates look bad until they fall. Three rates lie half a decade apart, around one that follows
from the model's width; the fourth is where the best of them points to. What is taken is a little below the lowest point
of the parabola through the best ones, over the logarithm of the rate: shorter runs like higher rates.
"""

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from lora_cli import run_dir, storage
from lora_cli.config import RunConfig
from lora_cli.errors import TrainingStopped
from lora_cli.optim import start_rate
from lora_cli.records import Event, Finished, Notice, Probed
from lora_cli.resume import create
from lora_cli.run_dir import RunDir
from lora_cli.session import Session, as_trial, for_trials, with_rate

SHARE = 0.1  # of the run's steps, for each trial
_FEWEST = 8  # steps that say something
_APART = math.sqrt(10)
_LONGER = 0.8  # of the rate that a trial likes best: measured in docs/hyperparameters.md


def choose_rate(session: Session, config: RunConfig, run: RunDir) -> Generator[Event, None, float]:
    """Return the learning rate for a run, in a directory that is held; yield what each rate came to.

    What was tried is kept in the run, and goes on where it was interrupted.
    """
    world = session.world
    if world.is_main:
        create(run, config, session.environment)
    known = world.from_main(run_dir.read_facts(run.probe) if world.is_main else None)
    if known:
        return float(known["chosen"])
    center = start_rate(session.prepared.width, config)
    steps = round(SHARE * session.total_steps(config))
    losses = dict[float, float]()
    if steps < _FEWEST:
        yield Notice(
            f"train.learning_rate: auto: {SHARE:.0%} of this run are {steps} steps, too few to try rates on; "
            f"{center:g} is taken, by the model's width."
        )
        chosen = center
    else:
        alone = _with_validation_of(for_trials(session), steps * config.train.batch_size)
        for rate in _rates(center, losses):
            losses[rate] = _try(alone, _shortened(config, run, rate, steps))
            yield _probed(rate, losses[rate], steps)
        chosen = float(f"{_LONGER * _lowest(losses):.2g}")
    if world.is_main:
        tried = [asdict(_probed(rate, loss, steps)) for rate, loss in sorted(losses.items())]
        storage.write_json(run.probe, {"format": run_dir.FORMAT, "tried": tried, "chosen": chosen})
        if losses:
            storage.remove_directory(run.probes)
    world.from_main()
    return chosen


def _with_validation_of(session: Session, rows: int) -> Session:
    """Return a session that measures no more than so many rows: a short trial would cost little beside all."""
    assert session.validation is not None, "config_checks asks for it"
    return replace(session, validation=session.validation.of_rows(rows))


def _shortened(config: RunConfig, run: RunDir, rate: float, steps: int) -> RunConfig:
    """Return the config of a trial: measured once, at its end."""
    trial = as_trial(with_rate(config, rate), RunDir(run.probes / f"{rate:.3g}"), steps)
    stopping = config.train.early_stopping.model_copy(update={"patience": None})
    return trial.model_copy(
        update={
            "train": trial.train.model_copy(update={"early_stopping": stopping}),
            "eval": config.eval.model_copy(update={"per_epoch": 1, "general": False, "forgetting_budget": None}),
            "save": config.save.model_copy(update={"per_epoch": 1}),
        }
    )


def _probed(rate: float, loss: float, steps: int) -> Probed:
    return Probed(rate, loss if math.isfinite(loss) else None, steps)


def _try(session: Session, config: RunConfig) -> float:
    """Return the validation loss at a trial's end, infinite where it stopped."""
    place = RunDir(Path(config.output_dir))
    ended = session.world.from_main(_loss_of(place) if session.world.is_main else None)
    if ended is not None:
        return float(ended)
    loss = math.inf
    with contextlib.suppress(TrainingStopped):
        for event in session.run(config, place):
            if isinstance(event, Finished):
                loss = event.best_loss or loss
    return loss


def _loss_of(place: RunDir) -> float | None:
    """Return what a trial ended with, None where it has not."""
    finished = run_dir.read_finished(place)
    return finished.best_loss if finished else None


def _rates(center: float, losses: Mapping[float, float]) -> Iterator[float]:
    """Iterate over the rates to try; `losses` has by then what those before came to."""
    for power in (0, -1, 1):
        yield center * _APART**power
    below, middle, above = (center * _APART**power for power in (-1, 0, 1))
    best = min(losses, key=lambda rate: losses[rate])
    if best == middle:
        yield middle * _APART ** (0.5 if losses[above] < losses[below] else -0.5)
    else:
        yield best * (_APART if best == above else 1 / _APART)


def _lowest(losses: Mapping[float, float]) -> float:
    """Return the rate at the lowest point of the parabola through the best rate and its neighbours; else the best."""
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    place = rates.index(best)
    if not 0 < place < len(rates) - 1 or math.isinf(losses[rates[place + 1]]):
        return best
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), losses[rate]) for rate in rates[place - 1 : place + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curve = (right - left) / (x2 - x0)
    lowest = (x0 + x1) / 2 - left / (2 * curve) if curve > 0 else x1
    return math.exp(min(max(lowest, x0), x2))
