"""The figures of a run elsewhere: TensorBoard, Weights & Biases and MLflow, each by its own library, offline."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import wandb
from conftest import Invoke, facts
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from lora_cli import api, checkpoint, metrics, tracking
from lora_cli.run_dir import RunDir
from lora_cli.trackers import wandb as weights_and_biases

ALL = ["tensorboard", "wandb", "mlflow"]
Figures = dict[str, list[tuple[int, float]]]  # name -> (step, value)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, and without what the machine, or a test before, says about trackers."""
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))


def in_tensorboard(run: Path) -> Figures:
    """What TensorBoard itself reads."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def offline_records(run: Path) -> Iterator[Any]:
    """The records of a run's offline files, one file after the other."""
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        yield from (Record.FromString(data) for data in weights_and_biases._records(file.read_bytes()))


def in_wandb(run: Path) -> Figures:
    """What would be sent to Weights & Biases."""
    found: Figures = {}
    for record in offline_records(run):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return found


def in_mlflow(run: Path) -> Figures:
    """What MLflow's own client reads."""
    client = MlflowClient((run / "mlruns").as_uri())
    (only,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    known = only.info.run_id
    return {
        name: [(each.step, each.value) for each in client.get_metric_history(known, name)] for name in only.data.metrics
    }


READ: dict[str, Callable[[Path], Figures]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
}


def measured(run: Path) -> Figures:
    """What the run itself wrote down."""
    found: Figures = {}
    for record in metrics.read(RunDir(run)):
        for name, value in tracking.figures(record).items():
            found.setdefault(name, []).append((record["step"], value))
    return found


def assert_holds(run: Path, trackers: list[str]) -> None:
    """Each tracker holds every figure of metrics.jsonl once, and the run's end."""
    wanted = measured(run)
    assert {"train/loss", "train/tokens_per_second", "validation/loss"} <= wanted.keys()
    for name in trackers:
        found = READ[name](run)
        assert {"best/loss", "base/loss"} <= found.keys(), name
        for key, rows in wanted.items():
            assert sorted(found[key]) == [(step, pytest.approx(value, rel=1e-6)) for step, value in rows], (name, key)


def test_every_tracker_holds_what_was_measured(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Figures, config and end; one JSON object on stdout, and nothing of theirs on stderr."""
    config = make_config(**{"train.trackers": ALL, "train.max_steps": 6, "eval.general": None, "data.test": 4})
    code, out, err = invoke("train", config, "--json")

    assert (code, json.loads(out)["step"]) == (0, 6)
    assert not [word for word in ("wandb", "mlflow", "tensorboard") if word in err.lower()]
    assert_holds(tmp_path / "run", ALL)
    assert {"forgetting/rise", "forgetting/kl", "train/learning_rate"} <= measured(tmp_path / "run").keys()
    assert {"test/loss", "test/change"} <= in_mlflow(tmp_path / "run").keys()

    client = MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (only,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (only.info.status, only.info.run_name, only.data.tags["reason"]) == ("FINISHED", "run", "all steps taken")
    assert (only.data.params["lora.rank"], only.data.params["train.epochs"]) == ("4", "2")
    settings = {
        (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
        for record in offline_records(tmp_path / "run")
        for item in record.config.update
    }
    assert settings["lora.rank"] == 4
    (exit_code,) = [record.exit.exit_code for record in offline_records(tmp_path / "run") if record.HasField("exit")]
    assert exit_code == 0


def killed(config: Path, after: str, call: int) -> None:
    """Train in a process that is killed when the program has called a function so often."""
    home, name = after.split(".")
    module = {"checkpoint": checkpoint, "metrics": metrics}[home]

    def work() -> None:
        processes.disturb(module, name, call, processes.send(signal.SIGKILL))
        processes.lora("train", config)

    assert processes.end(processes.fork(work, config.parent / "said")) == -signal.SIGKILL


@pytest.mark.parametrize(("after", "call"), [("metrics.append", 8), ("checkpoint.save", 2)])
def test_a_run_that_was_killed_has_each_step_once(
    after: str, call: int, invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """Killed between checkpoints and just behind one, and continued: one tracked run, no step lost or doubled."""
    config = make_config(**{"train.trackers": ALL, "train.max_steps": 8, "save.per_epoch": 3})
    killed(config, after, call)
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())
    code, _, err = invoke("train", config)

    assert (code, "Continuing after step" in err) == (0, True)
    assert_holds(tmp_path / "run", ALL)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]["id"] == known["mlflow"]["id"]
    assert len({file.name for file in tmp_path.glob("run/wandb/offline-run-*/*.wandb")}) == 1


def test_a_tracker_that_is_added_later_gets_what_was_before(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """A run stopped by a signal goes on with a tracker; nothing that is computed changes."""
    config = make_config(**{"train.max_steps": 8})

    def work() -> None:
        processes.disturb(metrics, "append", 6, processes.send(signal.SIGTERM))
        processes.lora("train", config)

    assert processes.end(processes.fork(work, tmp_path / "said")) == 143
    code, _, err = invoke("train", config, "train.trackers=[tensorboard]")
    assert (code, "Continuing after step" in err) == (0, True)
    assert_holds(tmp_path / "run", ["tensorboard"])

    invoke("train", config, f"output_dir={tmp_path / 'alone' / 'run'}")
    (one, files), (other, same) = facts(tmp_path / "run"), facts(tmp_path / "alone" / "run")
    cards = ("adapter/README.md", "adapter/MANIFEST.json")  # with the config, trackers and all
    assert one == other
    assert {name: data for name, data in files.items() if name not in cards} == {
        name: data for name, data in same.items() if name not in cards
    }


def test_a_tracker_that_fails_is_left_alone(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nobody listens at the address of the server, and a file stands where events should: said once, and trained."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make_config(**{"train.trackers": ["tensorboard", "mlflow"], "train.max_steps": 4})
    monkeypatch.setattr(tracking, "LONGEST_END_SECONDS", 10.0)
    code, out, err = invoke("train", config, "--json")

    assert (code, json.loads(out)["step"]) == (0, 4)
    assert [line.split(":")[0] for line in err.splitlines() if "is left alone" in line] == ["mlflow"]
    assert "mlflow" not in in_tensorboard(tmp_path / "run")
    assert_holds(tmp_path / "run", ["tensorboard"])


def test_what_is_missing_is_said_before_anything_is_written(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A package that is not there, and a login."""
    monkeypatch.setitem(sys.modules, "lora_cli.trackers.mlflow", None)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = invoke("train", make_config(**{"train.trackers": ["mlflow", "wandb"]}))

    assert code == 3
    assert "pip install 'lora-cli[mlflow]'" in err
    assert "train.trackers: wandb: there is no login here: run `wandb login`, set WANDB_API_KEY" in err
    assert "nothing was written" in err
    assert not (tmp_path / "run").exists()


def test_wrong_trackers_are_errors_of_the_config(invoke: Invoke, make_config: Callable[..., Path]):
    """An unknown name has its nearest match; a name stands there once."""
    assert 'Did you mean "tensorboard"?' in invoke("check", make_config(**{"train.trackers": ["tensorbord"]}))[2]
    assert "wandb stands there twice" in invoke("check", make_config(**{"train.trackers": ["wandb", "wandb"]}))[2]


def test_a_damaged_memory_of_trackers_stops_nothing(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """It is said, and the tracked run begins anew with what the run has measured."""
    config = make_config(**{"train.trackers": ["tensorboard"], "train.max_steps": 8})
    killed(config, "metrics.append", 8)
    (tmp_path / "run" / "trackers.json").write_text('{"tensorboard": {"step": "many"}}')
    code, _, err = invoke("train", config)

    assert (code, "What is tracked of this run begins anew" in err) == (0, True)
    assert_holds(tmp_path / "run", ["tensorboard"])


def test_a_search_tracks_the_run_of_its_best_only(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Trials leave no trace in trackers; the best, trained whole, does, under a name of its own."""
    config = make_config(**{"train.trackers": ["mlflow"], "train.max_steps": 6, "tune.prune": False})
    code, out, _ = invoke("tune", config, "--trials", "2", "--json")

    assert (code, len(json.loads(out)["trials"])) == (0, 2)
    assert [path.parent.name for path in (tmp_path / "run-tune").rglob("trackers.json")] == ["best"]
    assert_holds(tmp_path / "run-tune" / "best", ["mlflow"])


def test_a_run_that_is_called_from_python_is_tracked_too(make_config: Callable[..., Path], tmp_path: Path):
    """The config says so, whoever reads it."""
    api.train(api.load_config(make_config(**{"train.trackers": ["tensorboard"], "train.max_steps": 4})))
    assert_holds(tmp_path / "run", ["tensorboard"])


@pytest.mark.parametrize("run", [api.train, api.tune], ids=["train", "tune"])
def test_python_too_is_told_what_is_missing_first(
    run: Callable[[api.RunConfig], object],
    make_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Before anything is trained; a search would fail at its very end."""
    monkeypatch.setitem(sys.modules, "lora_cli.trackers.mlflow", None)
    with pytest.raises(api.SurroundingsError, match="mlflow is not installed"):
        run(api.load_config(make_config(**{"train.trackers": ["mlflow"]})))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("run")]


@pytest.mark.parametrize("run", [api.one_at_a_time, api.against_full], ids=["one-at-a-time", "against-full"])
def test_runs_that_are_not_tracked_refuse_trackers(
    run: Callable[[api.RunConfig], object], make_config: Callable[..., Path]
):
    """A key without an effect is an error, from Python as at the command line."""
    with pytest.raises(api.ConfigError, match="these runs are not tracked"):
        run(api.load_config(make_config(**{"train.trackers": ["tensorboard"]})))


def test_a_measurement_that_lacks_figures_gives_those_it_has():
    """A line of metrics.jsonl may be damaged, and is no reason to fail."""
    assert tracking.figures({"event": "step", "step": 3, "loss": 2.0, "seconds": 1.5}) == {"train/loss": 2.0}
