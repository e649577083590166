"""`train.learning_rate: auto`: what is tried, what is taken, and that a stop loses nothing."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import facts, opened

from lora_cli import card, config_file, metrics, probe, run_dir
from lora_cli.errors import Interrupted
from lora_cli.interrupt import StopRequest
from lora_cli.records import Event, Finished, Notice, Probed, StepDone
from lora_cli.train import train

SETTINGS: dict[str, Any] = {
    "train.learning_rate": "auto",
    "train.max_steps": 80,
    "train.epochs": 20,
    "save.per_epoch": 1,
}


def run(config: Path, stop: StopRequest | None = None) -> list[Event]:
    return list(train(config_file.load(config), stop or StopRequest()))


def rates(events: list[Event]) -> set[float]:
    return {round(math.log10(event.rate), 6) for event in events if isinstance(event, Probed)}


def test_the_rate_comes_from_trials_and_is_kept(make_config: Callable[..., Path], tmp_path: Path):
    """Four short runs whose table stays; the run is then the run that has the chosen rate in its config."""
    events = run(make_config(**SETTINGS))
    table = json.loads((tmp_path / "run" / "probe.json").read_text())
    tried = [event for event in events if isinstance(event, Probed)]

    assert len(tried) == len(table["tried"]) == 4
    assert {event.steps for event in tried} == {8}
    assert (
        min(each["rate"] for each in table["tried"]) <= table["chosen"] <= max(each["rate"] for each in table["tried"])
    )
    assert not (tmp_path / "run" / "probes").exists()
    assert f"that `auto` found is {table['chosen']:g}." in (tmp_path / "run" / "adapter" / card.FILE).read_text()
    settings = SETTINGS | {"train.learning_rate": table["chosen"], "output_dir": f"{tmp_path}/alone"}
    run(make_config(**settings))
    assert facts(tmp_path / "run")[0] == facts(tmp_path / "alone")[0]
    assert any(event.learning_rate == table["chosen"] for event in events if isinstance(event, StepDone))


def test_a_stop_between_trials_loses_none(make_config: Callable[..., Path], tmp_path: Path):
    """What was tried is not tried again, and the end is the same."""
    whole = run(make_config(**SETTINGS | {"output_dir": f"{tmp_path}/whole"}))
    config, stop = make_config(**SETTINGS), StopRequest()

    def stopped_after_two() -> None:
        seen = list[Event]()
        for event in train(config_file.load(config), stop):
            seen.append(event)
            if len(rates(seen)) == 2:
                stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        stopped_after_two()
    trials = [run_dir.RunDir(place) for place in (tmp_path / "run" / "probes").iterdir()]
    assert sorted(run_dir.read_status(trial)["status"] for trial in trials) == ["finished", "finished", "stopped"]
    ended = [run_dir.read_finished(trial) for trial in trials]
    assert [finished.step for finished in ended if finished] == [8, 8]
    again = run(config)

    assert rates(again) == rates(whole)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert isinstance(again[-1], Finished)


def test_a_run_too_short_for_trials_takes_the_rate_of_its_width(make_config: Callable[..., Path]):
    """It says so."""
    events = run(make_config(**SETTINGS | {"train.max_steps": 12}))
    notice = next(event.text for event in events if isinstance(event, Notice) and "auto" in event.text)

    assert not rates(events)
    assert "too few to try rates on; 0.006 is taken" in notice


def test_trials_measure_no_more_rows_than_they_train_on(make_config: Callable[..., Path], tmp_path: Path):
    """Eight steps of one row are not worth the validation of twenty."""
    settings = SETTINGS | {"train.batch_size": 1, "data.validation": 20}
    config = config_file.load(make_config(**settings))
    session = opened(config)
    assert session.validation is not None
    eight = session.validation.of_rows(8).examples
    trials = probe.choose_rate(session, config, run_dir.of(config))
    assert isinstance(next(trials), Probed)
    (trial,) = (tmp_path / "run" / "probes").iterdir()

    measured = metrics.read_evaluated(run_dir.RunDir(trial)).values()
    assert len(eight) == 8
    assert {each.targets for each in measured} == {int(eight.targets.sum())}


@pytest.mark.parametrize(("best", "fourth"), [(0.5, 10**0.25), (-0.5, 10**-0.25), (2.0, 10.0), (-2.0, 0.1)])
def test_the_fourth_trial_is_where_the_best_of_three_points_to(best: float, fourth: float):
    """Between the middle and its better neighbour, or beyond the end; of a parabola the lowest point is found."""
    losses = dict[float, float]()
    for rate in probe._rates(1.0, losses):
        losses[rate] = (math.log10(rate) - best * 0.4) ** 2

    assert list(losses)[3] == pytest.approx(fourth)
    if abs(best) < 1:
        assert probe._lowest(losses) == pytest.approx(10 ** (best * 0.4), rel=0.01)


def test_rates_that_stop_training_are_not_taken():
    """A loss that is not finite is no neighbour for a parabola."""
    assert probe._lowest({1e-3: 2.0, 1e-2: 1.0, 1e-1: math.inf}) == 1e-2
