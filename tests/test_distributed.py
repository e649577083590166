"""Several processes train as one would: the same numbers, one that writes, and none that goes on alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import processes
import pytest
import torch
from conftest import Invoke, build_examples, conversation, facts, write_config, write_rows
from processes import disturb, end, run_ranks, send, start_ranks
from torch.distributed.tensor import DTensor
from torture import agreement
from torture.agreement import Way

from lora_cli import batches, config_file, distributed, ending, heartbeat, lora, model, prepare, run_dir, step
from lora_cli.batches import ALONE, Mixture, Part
from lora_cli.config import LoraConfig, ModelConfig
from lora_cli.distributed import World
from lora_cli.examples import Example
from lora_cli.forward import lay_out, target_loss
from lora_cli.fused import fuse
from lora_cli.interrupt import StopRequest
from lora_cli.loss import LossSum
from lora_cli.records import StepDone
from lora_cli.run_dir import RunDir
from lora_cli.train import train

SETTINGS = agreement.SETTINGS | {"lora.dropout": 0.1}
Make = Callable[..., Path]


def close(first: Path, second: Path) -> bool:
    """Whether two runs measured the same things, losses and gradient norms to 1e-5."""
    return agreement.difference(*(agreement.measured(RunDir(place)) for place in (first, second))) < agreement.CLOSE


def finished(size: int, config: Path, folder: Path) -> Path:
    """Train on some processes to the end, of which only the first says something; return the run's place."""
    codes, said = run_ranks(size, lambda rank: processes.lora("train", config), folder)
    assert codes == [0] * size, said
    assert not any(said[1:])
    return Path(config_file.load(config).output_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Path:
    """A run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    return finished(2, write_config(folder, model_folder("llama"), rows, SETTINGS), folder)


@pytest.mark.parametrize(
    "way",
    [
        Way(1, 0.0, tokens=1),
        Way(1, 0.1, tokens=4096, recompute=True),
        Way(2, 0.0, tokens=30),
        Way(2, 0.1, shard=True, tokens=30),
        Way(4, 0.1),
        Way(4, 0.0, shard=True, recompute=True),
    ],
    ids=str,
)
def test_one_set_of_numbers_for_every_way_to_run_it(way: Way, model_folder: Callable[[str], str], tmp_path: Path):
    """Losses and gradient norms to 1e-5 of those written down, of the same tokens at each step."""
    found = agreement.measure(way, tmp_path, model_folder("llama"))

    assert len(found) > 16
    assert agreement.difference(found, agreement.golden(way.dropout)) < agreement.CLOSE


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_processes_that_go_in_step_are_given_as_many(count: int):
    """Every item counts once, on one of them; else each has its share alone."""
    for in_step in (True, False):
        ranks = [World(torch.device("cpu"), rank, 3, in_step) for rank in range(3)]
        shares = [list(rank.share(range(count))) for rank in ranks]

        assert sorted(item for share in shares for item, counts in share if counts) == list(range(count))
        assert len({len(share) for share in shares}) == 1 or not in_step
        assert in_step or all(counts for share in shares for _, counts in share)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_each_process_keeps_its_part_of_the_base(
    kind: Literal["nf4"] | None, model_folder: Callable[[str], str], tmp_path: Path
):
    """Matrices of blocks are divided, before a forward and after it; how a forward is laid out stays the same."""

    def work(rank: int) -> None:
        config = ModelConfig(path=model_folder("llama"), quantization=kind)
        header = model.read_header(config)
        with distributed.joined("cpu", in_step=True) as world:
            alone, divided = (model.load_model(header, config, world.device, each) for each in (None, world))
            assert divided.layout == alone.layout
            for one, other in zip(alone.module.parameters(), divided.module.parameters(), strict=True):
                assert torch.equal(other.full_tensor() if isinstance(other, DTensor) else other, one)
            assert divided.layout.tail
            for loaded in (alone, divided):
                lora.apply_lora(loaded.module, LoraConfig(rank=2), 0)
                fuse(loaded.module)
            one, other = (
                {path: type(each.forward) for path, each in x.module.named_modules()} for x in (alone, divided)
            )
            assert one == other
            run = lay_out(divided, ALONE, [Example((3, 4, 5), (3, 4, 5), "tokens of no row")])
            for _ in range(2):
                parts = dict(divided.module.named_parameters())
                for name, parameter in alone.module.named_parameters():
                    part = parts[name].to_local() if isinstance(parts[name], DTensor) else parts[name]
                    is_divided = ".layers." in name and parameter.ndim == 2 and "lora_" not in name
                    assert part.untyped_storage().nbytes() == parameter.nbytes // (2 if is_divided else 1), name
                target_loss(divided, run).total.backward()

    codes, said = run_ranks(2, work, tmp_path)
    assert codes == [0, 0], said


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_divided_too(kind: str, make_config: Make, tmp_path: Path):
    """Two processes, each with its part of what is packed, measure what one does with all of it."""
    settings = SETTINGS | {"model.quantization": kind, "train.max_steps": 6, "train.micro_batch_tokens": 40}
    runs = []
    for size in (1, 2):
        config = make_config(**settings | {"train.shard": size > 1, "output_dir": f"{tmp_path}/{size}"})
        runs.append(agreement.measured(RunDir(finished(size, config, tmp_path))))

    assert len(runs[0]) > 6
    assert agreement.difference(*runs) < agreement.CLOSE


def stopped_after(number: int, config: Path) -> None:
    """Train, and ask to stop after a step; the exit is a failure's where nothing stopped it."""
    stop = StopRequest()
    for event in train(config_file.load(config), stop):
        if isinstance(event, StepDone) and event.step == number:
            stop.signal_number = signal.SIGTERM
    raise AssertionError("it should have stopped")


def test_a_run_goes_on_with_other_processes(make_config: Make, whole: Path, tmp_path: Path):
    """Two processes, then one, then two: as two all the time, to 1e-5."""
    config = make_config(**SETTINGS)
    for number, size in ((2, 2), (4, 1)):
        codes, said = run_ranks(size, lambda rank, number=number: stopped_after(number, config), tmp_path)
        assert codes == [70] * size
        assert f"stopped on request after step {number} of 16" in said[0]

    assert close(finished(2, config, tmp_path), whole)


def second_of(number: int, rows: str) -> str:
    """The place of the row in the second forward of a step, where each has one."""
    examples, _ = build_examples(rows)
    step = [examples[index] for index in batches.plan_epoch(Mixture((Part(0, 40),)), 4, 0, 0)[number]]
    ((member,),) = (group.members for group in batches.micro_batches(step, 1, "packed")[1])
    return step[member].where


def not_a_number(loss: LossSum) -> LossSum:
    return LossSum(loss.total * torch.nan, loss.targets)


def infinite_gradient(loss: LossSum) -> LossSum:
    zero = loss.total - loss.total.detach()
    return LossSum(loss.total + torch.sqrt(zero * zero.detach() + zero), loss.targets)


@pytest.mark.parametrize(("fault", "what"), [(not_a_number, "loss is nan"), (infinite_gradient, "gradient norm is")])
def test_what_is_not_finite_on_one_process_stops_all(
    fault: Callable[[LossSum], LossSum], what: str, make_config: Make, rows_file: str, tmp_path: Path
):
    """The step is applied nowhere and not saved; the first process names the rows that the other had; exit 4."""
    config = make_config(**SETTINGS | {"train.micro_batch_tokens": 1, "data.validation": 0})

    def work(rank: int) -> None:
        if rank == 1:
            # Of four rows two are this process's: the first forward of the fourth step.
            disturb(step, "target_loss", 7, fault, for_good=True)
        processes.lora("train", config)

    codes, said = run_ranks(2, work, tmp_path)
    place = RunDir(tmp_path / "run")
    wrong = next(line for line in said[0].splitlines() if "Rows of it" in line)

    assert codes == [4, 4]
    assert f"step 4: the {what}" in wrong
    assert wrong.endswith(f"Rows of it: {second_of(3, rows_file)}.")
    assert "not applied" in said[0]
    assert max(number for number, _ in run_dir.step_folders(place)) <= 3
    assert run_dir.read_status(place)["status"] == "failed"


def out_of_memory(_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_on_one_process_is_all_processes_business(make_config: Make, tmp_path: Path):
    """All take the step again with smaller forwards; the numbers are those of a run that had enough."""
    settings = SETTINGS | {"train.micro_batch_tokens": 80, "lora.dropout": 0.0}
    enough = finished(1, make_config(**settings, output_dir=f"{tmp_path}/enough"), tmp_path)
    config = make_config(**settings)

    def work(rank: int) -> None:
        if rank == 1:
            disturb(step, "target_loss", 2, out_of_memory)
        processes.lora("train", config)

    codes, said = run_ranks(2, work, tmp_path)

    assert codes == [0, 0]
    assert "is taken again with 40 tokens a forward" in said[0]
    assert close(tmp_path / "run", enough)


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(make_config: Make, whole: Path, tmp_path: Path):
    """Killed in its fifth forward: the other ends within seconds with exit 3; then the same bits as undisturbed."""
    config = make_config(**SETTINGS)

    def work(rank: int) -> None:
        if rank == 1:
            disturb(step, "target_loss", 5, send(signal.SIGKILL))
        processes.lora("train", config)

    begin = time.monotonic()
    codes, said = run_ranks(2, work, tmp_path)

    assert codes == [3, -signal.SIGKILL]
    assert "another of the 2 processes of this run ended" in said[0]
    assert time.monotonic() - begin < 30
    assert facts(finished(2, config, tmp_path)) == facts(whole)


@pytest.mark.parametrize("halted", [0, 1])
def test_a_halted_process_ends_the_others(
    halted: int, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever they wait for: the others say which showed no life, exit 3, and write nothing more."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.1)
    config = make_config(**SETTINGS | {"train.epochs": 1000, "train.max_steps": 5000, "data.validation": 0})
    ranks = start_ranks(2, lambda rank: processes.lora("train", config), tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    os.kill(ranks[halted], signal.SIGSTOP)
    try:
        assert end(ranks[1 - halted], seconds=20) == 3
        what = (
            "where the 2 processes of this run meet, has not answered"
            if halted == 0
            else "process 1 of 2 (counted from 0) was"
        )
        assert what in (tmp_path / f"rank-{1 - halted}").read_text()
    finally:
        os.kill(ranks[halted], signal.SIGKILL)
        os.waitpid(ranks[halted], 0)


def test_a_halted_main_process_is_not_waited_for(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While it prepares the data the others only wait; they end as well."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.1)
    config = make_config(**SETTINGS)

    def work(rank: int) -> None:
        if rank == 0:
            disturb(prepare, "prepare", 1, send(signal.SIGSTOP))
        processes.lora("train", config)

    main, other = start_ranks(2, work, tmp_path)
    try:
        assert end(other, seconds=20) == 3
        assert "where the 2 processes of this run meet, has not answered" in (tmp_path / "rank-1").read_text()
    finally:
        os.kill(main, signal.SIGKILL)
        os.waitpid(main, 0)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_processes_that_see_other_files_do_not_train_together(make_config: Make, tmp_path: Path):
    """Another config or other data on one process is an error on all, before anything is written."""
    other = write_rows(tmp_path / "other.jsonl", [conversation(number) for number in range(50, 90)])
    config = make_config(**SETTINGS)
    codes, said = run_ranks(
        2, lambda rank: processes.lora("train", config, *([f"data.train={other}"] * rank)), tmp_path
    )

    assert codes == [2, 2]
    assert "process 1 has another data.train than process 0" in said[0]
    assert "process 1 has another data than process 0" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2"),
    ],
)
def test_half_an_environment_of_torchrun_is_named(
    environment: dict[str, str], what: str, make_config: Make, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
):
    """What is missing or makes no sense is said; nothing waits for processes that will not come."""
    monkeypatch.setattr(ending, "_OTHERS_SECONDS", 0.0)
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} if len(environment) > 1 else {}).items():
        monkeypatch.setenv(name, value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, said = invoke("train", make_config())

    assert code == 3
    assert what in said


def test_torchrun_stops_and_goes_on(make_config: Make, whole: Path, tmp_path: Path):
    """A SIGTERM to torchrun reaches all: they save at one step, end, and the run goes on to the same bits."""
    config = make_config(**SETTINGS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "lora_cli", "train", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    status = json.loads((tmp_path / "run" / "run.json").read_text())

    assert said.count("stopped on request") == 1
    assert said.count("Continue with: lora train") == 1
    assert status["status"] == "stopped"
    assert facts(finished(2, config, tmp_path)) == facts(whole)


def test_a_divided_base_is_evaluated_in_step(make_config: Make, tmp_path: Path):
    """Two processes that each have a part of it give the figures, and the answers, of one that has it whole."""
    config = make_config(**SETTINGS | {"train.shard": True, "train.max_steps": 4})
    place = finished(2, config, tmp_path)
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(number) for number in range(100, 170)])
    reports = []
    for size in (1, 2):
        asked = ["eval", place, "--data", held_out, "--max-new-tokens", 8, "--json"]
        codes, said = run_ranks(size, lambda rank, asked=asked: processes.lora(*asked), tmp_path)
        assert codes == [0] * size, said
        reports.append(json.loads(said[0].splitlines()[-1]))

    one, other = reports
    assert one["samples"] == other["samples"]
    assert len({sample["tuned"] for sample in one["samples"]}) > 1
    assert other["figures"]["loss"]["tuned"]["value"] == pytest.approx(
        one["figures"]["loss"]["tuned"]["value"], rel=1e-5
    )
