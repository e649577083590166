"""`lora tune`: what is tried and what comes of it, that nothing is lost or done twice, and what cannot be searched."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import facts, run_to_end
from processes import end, fork, lora

from lora_cli import config_file, run_dir, search_dir, space
from lora_cli.errors import ConfigError, Interrupted, UserError
from lora_cli.interrupt import StopRequest
from lora_cli.records import Event, TrialEnded
from lora_cli.run_dir import RunDir
from lora_cli.search_reports import TuneReport
from lora_cli.train import ended, train
from lora_cli.tune import tune

SETTINGS: dict[str, Any] = {
    "tune.trials": 6,
    "tune.budget": 0.5,
    "tune.space": {"train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "lora.rank": [2, 4]},
    "train.learning_rate": 0.01,
    "train.max_steps": 18,
    "train.epochs": 20,
    "lora.rank": 4,
    "eval.per_epoch": 1,
    "eval.general": False,
    "save.per_epoch": 1,
}


def search(config: Path, stop: StopRequest | None = None) -> TuneReport:
    return run_to_end(tune(config_file.load(config), stop or StopRequest()))


def figures(trials: Any) -> list[tuple[Any, ...]]:
    """What must be the same whenever a search is made: all but times."""
    return [(one.number, dict(one.values), one.state, one.loss, one.steps, one.tokens) for one in trials]


def test_the_best_trial_is_trained_whole(make_config: Callable[..., Path], tmp_path: Path):
    """The first trial is the config itself, later ones differ; the best's config is a run that `lora train` knows."""
    report = search(make_config(**SETTINGS))
    place = search_dir.of(config_file.load(make_config(**SETTINGS)))

    assert place.path == tmp_path / "run-tune"
    assert [one.number for one in report.trials] == list(range(6))
    assert report.trials[0].values == {"train.learning_rate": 0.01, "lora.rank": 4}
    assert len({str(one.values) for one in report.trials}) == 6
    finished = [one for one in report.trials if one.state == "finished"]
    assert {one.steps for one in finished} == {one.of_steps for one in report.trials} == {9}
    best = min(finished, key=lambda one: one.loss or 9.0)
    assert report.best == best.number
    assert report.config == place.best_config
    assert json.loads(place.report.read_text())["best"] == best.number
    chosen = config_file.load(place.best_config)
    assert ended(chosen) == report.final
    assert chosen.lora.rank == best.values["lora.rank"]
    alone = chosen.model_copy(update={"output_dir": str(tmp_path / "alone")})
    assert list(train(alone, StopRequest()))
    assert facts(place.best.path) == facts(tmp_path / "alone")


def test_trials_that_are_behind_are_given_up(make_config: Callable[..., Path], tmp_path: Path):
    """At a ninth or a third of their steps; the whole search takes fewer steps than without."""
    pruned, whole = (
        search(make_config(**SETTINGS | {"tune.trials": 9, "tune.prune": prune, "output_dir": f"{tmp_path}/{name}"}))
        for prune, name in ((True, "pruned"), (False, "whole"))
    )
    given_up = [one for one in pruned.trials if one.state == "pruned"]

    assert {one.steps for one in given_up} <= {1, 3}
    assert given_up
    assert {one.state for one in whole.trials} == {"finished"}
    assert sum(one.steps for one in pruned.trials) < 0.7 * sum(one.steps for one in whole.trials)
    trial = RunDir(tmp_path / "pruned-tune" / "trials" / f"{given_up[0].number:04d}")
    assert run_dir.read_status(trial)["status"] == "stopped"
    assert run_dir.step_folders(trial) == []


def test_a_search_that_was_stopped_goes_on(make_config: Callable[..., Path], tmp_path: Path):
    """In the middle of its third trial: the trials, what they came to and the best are those of a search unstopped."""
    whole = search(make_config(**SETTINGS | {"output_dir": f"{tmp_path}/whole"}))
    config, stop = make_config(**SETTINGS), StopRequest()

    def stopped_in_the_third() -> None:
        done = 0
        for event in tune(config_file.load(config), stop):
            done += isinstance(event, TrialEnded)
            if done == 2 and not isinstance(event, TrialEnded):
                stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        stopped_in_the_third()
    again = list[Event]()
    going_on = tune(config_file.load(config), StopRequest())
    report = run_to_end(_seen(going_on, again))

    assert [event.number for event in again if isinstance(event, TrialEnded)] == [2, 3, 4, 5]
    assert figures(report.trials) == figures(whole.trials)
    assert facts(tmp_path / "run-tune" / "best") == facts(tmp_path / "whole-tune" / "best")


def _seen(events: Any, seen: list[Event]) -> Any:
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        seen.append(event)
        yield event


@pytest.mark.parametrize("database", [False, True])
def test_two_processes_share_a_search_and_one_is_killed(
    database: bool, make_config: Callable[..., Path], tmp_path: Path
):
    """Every trial is done once, by one of them or by who goes on with what the killed one left."""
    storage = f"sqlite:///{tmp_path}/study.db" if database else None
    config = make_config(**SETTINGS | {"tune.trials": 8, "tune.storage": storage})
    first, second = (fork(lambda: lora("tune", config), tmp_path / f"said-{number}") for number in (1, 2))
    trials = tmp_path / "run-tune" / "trials"
    while not (trials / "0003" / "metrics.jsonl").exists() and not os.waitpid(first, os.WNOHANG)[0]:
        pass
    os.kill(first, signal.SIGKILL)
    assert end(first) == -signal.SIGKILL
    assert end(second) == 0, (tmp_path / "said-2").read_text()
    report = search(config)

    assert [one.number for one in report.trials] == list(range(8))
    assert report.running == 0
    assert report.final is not None
    for one in report.trials:
        steps = [
            record["step"]
            for record in map(json.loads, (trials / f"{one.number:04d}" / "metrics.jsonl").read_text().splitlines())
            if record["event"] == "step"
        ]
        assert steps == list(range(1, one.steps + 1))
    if database:
        study = optuna.load_study(study_name=str(tmp_path / "run"), storage=storage)
        assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED", "FAIL"}


def test_more_trials_go_on_with_the_same_search(make_config: Callable[..., Path]):
    """What was tried stays; nothing is done where all is done; the best may be another."""
    fewer = search(make_config(**SETTINGS | {"tune.trials": 2}))
    more = search(make_config(**SETTINGS | {"tune.trials": 5}))
    seen = list[Event]()
    again = run_to_end(_seen(tune(config_file.load(make_config(**SETTINGS | {"tune.trials": 5})), StopRequest()), seen))

    assert figures(more.trials)[:2] == figures(fewer.trials)
    assert len(more.trials) == 5
    assert not [event for event in seen if isinstance(event, TrialEnded)]
    assert again == more


def test_a_journal_cut_short_by_a_power_cut_is_mended(make_config: Callable[..., Path]):
    """Of its last line a part is left; the trial that it told of goes on, and is told of again."""
    config = make_config(**SETTINGS | {"tune.trials": 2})
    whole = search(config)
    journal = search_dir.of(config_file.load(config)).journal
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    os.utime(journal, (0, 0))
    again = search(config)

    assert figures(again.trials) == figures(whole.trials)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_trial_whose_training_stops_is_not_the_best(make_config: Callable[..., Path]):
    """It counts as tried, and the search goes on."""
    searched = {"train.learning_rate": [1e-2, 1e30], "lora.rank": [2, 4]}
    report = search(make_config(**SETTINGS | {"tune.prune": False, "tune.space": searched, "tune.trials": 5}))
    states = {one.values["train.learning_rate"]: (one.state, one.loss) for one in report.trials}

    assert states[1e30] == ("diverged", None)
    assert states[1e-2][0] == "finished"
    assert report.final is not None


def test_forgetting_is_a_bound_or_a_second_objective(
    make_config: Callable[..., Path], shared_model: str, tmp_path: Path
):
    """With a budget a trial within it is preferred to a better one over it; with both, none of the front is beaten."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her mom. "
    (tmp_path / "story.txt").write_text(story * 20)  # which the model tells by itself
    settings = SETTINGS | {"model.path": shared_model, "data.chat_template": "zephyr", "tune.trials": 4}
    settings |= {"eval.general": f"{tmp_path}/story.txt", "eval.general_tokens": 256, "tune.prune": False}
    bound = search(make_config(**settings | {"output_dir": f"{tmp_path}/bound", "eval.forgetting_budget": 1e-6}))
    both = search(make_config(**settings | {"output_dir": f"{tmp_path}/both", "tune.objective": "loss-and-forgetting"}))
    front = [both.trials[number] for number in both.front]

    excesses = {one.number: one.excess for one in bound.trials if one.state == "finished"}
    assert len(set(excesses.values())) > 1
    assert bound.best == min(excesses, key=lambda number: excesses[number])
    assert both.best in both.front
    for one in front:
        better = [
            other
            for other in both.trials
            if other is not one
            and (other.loss or 9) <= (one.loss or 9)
            and (other.forgetting or 0) < (one.forgetting or 0)
        ]
        assert not better


@pytest.mark.parametrize(
    ("searched", "said"),
    [
        ({"lora.ranks": [1, 2]}, "lora.ranks cannot be searched; what can be: lora.method, lora.init"),
        ({"data.max_length": [1, 2]}, "data.max_length cannot be searched"),
        ({"train.micro_batch_tokens": [64, 128]}, "train.micro_batch_tokens cannot be searched"),
        ({"lora.rank": [2, 0.5]}, "lora.rank: 0.5 cannot be its value"),
        ({"lora.rank": {"low": 2, "high": 4.5}}, "lora.rank: 4.5 cannot be its value"),
        ({"lora.method": ["lora", "full"]}, "lora.method: full cannot be its value: one of lora, rslora, dora"),
        ({"lora.rank": {"low": 4, "high": 2}}, "low must be below high, found 4 and 2"),
        ({"lora.dropout": {"low": 0, "high": 0.1, "log": True}}, "must begin above 0, found 0"),
        ({"lora.rank": [2, 2]}, "lora.rank: names a value twice"),
    ],
)
def test_what_cannot_be_searched_is_refused(searched: dict[str, Any], said: str, make_config: Callable[..., Path]):
    """Before anything is read, with the key and what is accepted."""
    with pytest.raises(ConfigError) as caught:
        config_file.load(make_config(**{"tune.space": searched}))

    assert said in caught.value.paragraph()


def test_whole_numbers_are_searched_where_a_key_takes_only_those(make_config: Callable[..., Path]):
    """By the config's own types."""
    config = config_file.load(make_config())

    whole = [key for key in ("lora.rank", "lora.alpha", "train.epochs", "lora.dropout") if space.is_whole(config, key)]
    assert whole == ["lora.rank", "train.epochs"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora.alpha": 3.0}, "holds a search around another config: lora.alpha: 8.0 there, 3.0 now"),
        ({"data.validation": 0}, "runs are held against each other by validation loss"),
        (
            {"tune.storage": "sqlite:////nowhere/at/all.db"},
            "tune.storage: sqlite:////nowhere/at/all.db cannot be opened",
        ),
    ],
)
def test_a_search_of_something_else_is_refused(change: dict[str, Any], said: str, make_config: Callable[..., Path]):
    """Nothing in its folder changes."""
    place = search_dir.of(config_file.load(make_config(**SETTINGS)))
    search(make_config(**SETTINGS | {"tune.trials": 1}))
    before = sorted(path for path in place.path.rglob("*") if path.suffix != ".log")
    with pytest.raises(UserError) as caught:
        search(make_config(**SETTINGS | {"tune.trials": 1} | change))

    assert said in " ".join(str(caught.value).split())
    assert sorted(path for path in place.path.rglob("*") if path.suffix != ".log") == before
