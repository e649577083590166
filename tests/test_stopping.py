"""A run or a command that is stopped, in whatever it is doing: it ends soon, is whole, and goes on as if it had not."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import facts, save_base, save_with_peft
from processes import disturb, end, fork, lora, send
from torture import kills

from lora_cli import (
    checkpoint,
    config_file,
    corpus,
    data_file,
    evaluate,
    generate,
    interrupt,
    metrics,
    model,
    parallel,
    run_dir,
    step,
    tensor_file,
)
from lora_cli.errors import Interrupted, TrainingStopped
from lora_cli.interrupt import StopRequest
from lora_cli.loss import LossSum
from lora_cli.records import Finished, Preparing
from lora_cli.run_dir import RunDir
from lora_cli.step import lost
from lora_cli.train import train

Whole = tuple[Path, Path]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def finish(config: Path, folder: Path) -> Path:
    """Give the same command, which goes on to the end; return the run's place."""
    assert end(fork(lambda: lora("train", config), folder / "said")) == 0, (folder / "said").read_text()
    return folder / "run"


def start(config: Path, folder: Path) -> int:
    return fork(lambda: lora("train", config), folder / "said")


def wait_for(number: int, folder: Path) -> None:
    """Wait until a step is written down."""
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {number},' in metrics.read_text()):
        time.sleep(0.001)


def test_a_killed_run_goes_on_bit_for_bit(whole: Whole, tmp_path: Path):
    """Twelve steps in one go equal five and the rest with a SIGKILL between: every byte but the times."""
    config, undisturbed = whole
    process = start(config, tmp_path)
    wait_for(5, tmp_path)
    os.kill(process, signal.SIGKILL)

    assert end(process) == -signal.SIGKILL
    assert run_dir.read_status(RunDir(tmp_path / "run"))["status"] == "running"
    assert facts(finish(config, tmp_path)) == facts(undisturbed)


def test_whole_processes_killed_anywhere_end_as_if_they_were_not(tmp_path: Path):
    """One of the runs of `torture.kills`, started and killed as a user's would be."""
    found = kills.run(seed=0, count=1, folder=tmp_path)

    assert sum(found["kills"].values()) >= 1
    assert found["failures"] == []


@pytest.mark.parametrize("number", CODES)
def test_a_stopped_run_saves_and_goes_on(whole: Whole, number: signal.Signals, tmp_path: Path):
    """Each signal lets the step finish, saves, says how to go on, and has its exit code; nothing is lost."""
    config, undisturbed = whole
    process = start(config, tmp_path)
    wait_for(3, tmp_path)
    os.kill(process, number)
    place = RunDir(tmp_path / "run")

    assert end(process) == CODES[number]
    assert f"Continue with: lora train {config}" in (tmp_path / "said").read_text()
    done = run_dir.read_status(place)
    assert done["status"] == "stopped"
    assert run_dir.step_folders(place)[0][0] == done["step"]
    assert facts(finish(config, tmp_path)) == facts(undisturbed)


def test_nohup_is_heeded(whole: Whole, tmp_path: Path):
    """Where SIGHUP is ignored already, it stays so."""
    config, undisturbed = whole

    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        disturb(step, "target_loss", 5, send(signal.SIGHUP))
        lora("train", config)

    assert end(fork(work, tmp_path / "said")) == 0
    assert facts(tmp_path / "run") == facts(undisturbed)


def test_a_stop_before_the_first_step_leaves_nothing(whole: Whole, tmp_path: Path):
    """While the model is loaded there is nothing to save: the process ends at once."""
    config, _ = whole

    def work() -> None:
        disturb(model, "load_model", 1, send(signal.SIGINT))
        lora("train", config)

    assert end(fork(work, tmp_path / "said")) == 130
    assert "stopped; nothing was written. Continue with: lora train" in (tmp_path / "said").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [2, 12])
def test_a_stop_while_evaluating_loses_nothing(whole: Whole, call: int, tmp_path: Path):
    """In the base's validation, or a later one: it ends before the next batch, and is measured anew.

    Then the run is killed where that is written down and not yet saved, and goes on once more.
    """
    config, undisturbed = whole

    def stopped() -> None:
        def told(_: Any) -> None:
            send(signal.SIGTERM)(_)
            disturb(evaluate, "target_scores", 1, lambda _: os._exit(71))

        disturb(evaluate, "target_scores", call, told)
        lora("train", config)

    def killed() -> None:
        disturb(metrics, "append", 1, send(signal.SIGKILL))
        lora("train", config)

    assert end(fork(stopped, tmp_path / "said")) == 143
    saved, _ = checkpoint.latest(RunDir(tmp_path / "run"))
    assert (saved is None) == (call == 2)
    assert saved is None or not checkpoint.is_evaluated(saved)
    assert end(fork(killed, tmp_path / "said")) == -signal.SIGKILL
    assert facts(finish(config, tmp_path)) == facts(undisturbed)


def test_asked_twice_it_ends_at_once(whole: Whole, tmp_path: Path):
    """The second Ctrl-C does not wait for the step; what is there is whole."""
    config, undisturbed = whole

    def twice(_: Any) -> None:
        send(signal.SIGINT)(_)
        send(signal.SIGINT)(_)
        os._exit(71)

    def work() -> None:
        disturb(step, "target_loss", 20, twice)
        lora("train", config)

    assert end(fork(work, tmp_path / "said")) == 130
    assert "stopped at once" in (tmp_path / "said").read_text()
    assert facts(finish(config, tmp_path)) == facts(undisturbed)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_while_tokens_are_made_leaves_none(
    processes: int, make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It ends with the block under way; no process, no half of the kept tokens is left, and no run was begun."""
    monkeypatch.setattr(corpus, "usable_processors", lambda: processes)
    monkeypatch.setattr(corpus, "SMALL", 0)
    monkeypatch.setattr(data_file, "BLOCK_BYTES", 500)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    seen = []

    def prepare_and_stop() -> None:
        for event in train(config_file.load(make_config()), interrupt.requested()):
            if isinstance(event, Preparing):
                seen.append(event)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted), interrupt.listening("lora train"):
        prepare_and_stop()

    assert len(seen) == 1
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    assert not (tmp_path / "run").exists()


VERBS = {
    "merge": ("merge", "{a}", "--output", "{out}"),
    "gguf": ("export", "{a}", "--format", "gguf", "--output", "{out}.gguf"),
    "ollama": ("export", "{a}", "--format", "ollama", "--output", "{out}"),
    "eval": ("eval", "{a}", "--data", "{rows}"),
}


READ, SCORE, CHOOSE = (tensor_file, "read_tensor"), (evaluate, "target_scores"), (generate, "end_tokens")


@pytest.mark.parametrize(
    ("verb", "where", "call"),
    [
        ("merge", READ, 5),
        ("merge", READ, 40),
        ("gguf", READ, 5),
        ("ollama", READ, 5),
        ("eval", SCORE, 1),
        ("eval", CHOOSE, 1),
    ],
)
def test_a_stopped_command_leaves_nothing(verb: str, where: tuple[Any, str], call: int, rows_file: str, tmp_path: Path):
    """A merge, its comparison, an export, an evaluation: what was being written is gone, and what to type is said."""
    base = save_base("llama", tmp_path / "base")
    save_with_peft(str(base), tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    places = {"a": tmp_path / "a", "out": tmp_path / "out", "rows": rows_file}
    arguments = [part.format(**places) for part in VERBS[verb]]
    said = tmp_path.parent / f"{tmp_path.name}-said"

    def work() -> None:
        disturb(*where, call, send(signal.SIGTERM))
        lora(*arguments)

    assert end(fork(work, said)) == 143
    assert f"Continue with: lora {' '.join(arguments)}" in said.read_text()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_closed_stderr_does_not_end_a_run(whole: Whole, tmp_path: Path):
    """Nobody reads what is said any more: the run ends as it would have."""
    config, undisturbed = whole

    def work() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        lora("train", config)

    assert end(fork(work, tmp_path / "said")) == 0
    assert facts(tmp_path / "run") == facts(undisturbed)


def test_a_loss_that_jumps_stops_the_run_again_and_again(make_config: Callable[..., Path], tmp_path: Path):
    """The step is not applied; going on from the checkpoint finds the same jump against the same losses before."""
    config = make_config(**{"train.max_loss_jump": 3.0, "data.validation": 0, "train.max_steps": 12})

    def loud(loss: LossSum) -> LossSum:
        return LossSum(loss.total * 5, loss.targets)

    said = []
    for first in (True, False):

        def work(first: bool = first) -> None:
            seed_of_step = step.derive_seed

            def quiet_until_ten(seed: int, *purpose: str | int) -> int:
                if purpose[:2] == ("dropout", 11):
                    disturb(step, "target_loss", 1, loud, for_good=True)
                return seed_of_step(seed, *purpose)

            step.derive_seed = quiet_until_ten
            lora("train", config)

        assert end(fork(work, tmp_path / "said")) == 4
        said.append(next(line for line in (tmp_path / "said").read_text().splitlines() if "step 11" in line))
        assert run_dir.step_folders(RunDir(tmp_path / "run"))[0][0] == 10

    assert said[0] == said[1]
    assert "more than 3 times (train.max_loss_jump) the usual" in said[0]
    assert "rows.jsonl:" in said[0]


def test_a_run_that_only_gets_worse_is_stopped(make_config: Callable[..., Path], tmp_path: Path):
    """Where 32 steps are worse than a base that knew the rows, by more than a nat; at a rate that learns it goes on."""
    settings = {"train.max_steps": 40, "train.epochs": 20, "train.early_stopping.patience": None}
    settings |= {
        "data.split_by": "row",
        "data.allow_overlap": True,
        "eval.general": False,
        "train.schedule": "constant",
    }
    known = {"lora.method": "full", "lora.rank": 32, "lora.alpha": 32.0, "train.learning_rate": 0.01}
    taught = list(train(config_file.load(make_config(**settings | known)), StopRequest()))[-1]
    assert isinstance(taught, Finished)
    assert (taught.best_loss or 9.0) < 2.0
    settings |= {"model.path": str(taught.adapter)}
    with pytest.raises(TrainingStopped, match=r"step 3\d: the last 32 steps had a mean loss of [\d.]+; the base has"):
        list(
            train(
                config_file.load(
                    make_config(**settings | {"train.learning_rate": 1.0}), [f"output_dir={tmp_path}/bad"]
                ),
                StopRequest(),
            )
        )
    fine = config_file.load(make_config(**settings | {"train.learning_rate": 1e-3}), [f"output_dir={tmp_path}/fine"])

    assert isinstance(list(train(fine, StopRequest()))[-1], Finished)
    assert lost([5.0] * 31, 1.0) is None
    assert lost([5.0] * 32, 4.5) is None
    assert lost([5.0] * 32, None) is None


def test_other_processes_are_not_waited_for():
    """What a process is in the middle of is not brought to its end."""
    begin = time.monotonic()
    with interrupt.listening("lora"), interrupt.patience(), pytest.raises(Interrupted):  # noqa: PT012
        for _ in parallel.ordered_map(time.sleep, [0.0, 30.0, 30.0, 30.0, 30.0], processes=2):
            os.kill(os.getpid(), signal.SIGTERM)

    assert time.monotonic() - begin < 10


def test_a_jump_is_seen_against_the_median():
    """Not among the first few, not for one that is high but usual; the median is that of the steps before."""
    assert step.jump(9.0, [2.0] * 7, 4.0) is None
    assert step.jump(9.0, [2.0] * 7 + [50.0], 4.0) == 2.0
    assert step.jump(7.9, [2.0] * 8, 4.0) is None
    assert step.jump(9.0, [2.0] * 8, None) is None
    assert step.jump(float(torch.inf), [2.0] * 8, 4.0) == 2.0
