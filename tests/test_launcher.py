"""`--nproc`: the command in several processes here, and an end that is theirs: code, message and what is saved."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Invoke, facts
from processes import end, fork, lora, run_ranks

from lora_cli import run_dir
from lora_cli.run_dir import RunDir

Make = Callable[..., Path]
SETTINGS = {"lora.dropout": 0.1, "train.max_steps": 12, "save.per_epoch": 4, "train.early_stopping": {"patience": None}}


def begin(config: Path, folder: Path, *arguments: object) -> int:
    """Start `lora train --nproc 2` and return the launcher's process once it takes steps."""
    process = fork(lambda: lora("train", config, "--nproc", 2, *arguments), folder / "said", OMP_NUM_THREADS="1")
    metrics = folder / "run" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < limit:
        time.sleep(0.01)
    return process


def ranks(process: int) -> list[int]:
    """The processes that a launcher started, by rank."""
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=True).stdout
    return sorted(map(int, listed.split()))


def test_a_signal_reaches_the_processes_and_they_save(make_config: Make, tmp_path: Path):
    """Ctrl-C to the launcher: saved once, said once, and the exit code is theirs; then two processes go on."""
    config = make_config(**SETTINGS | {"train.max_steps": 3000, "train.epochs": 1000, "data.validation": 0})
    process = begin(config, tmp_path)
    workers = ranks(process)
    os.kill(process, signal.SIGINT)

    assert end(process) == 130
    said = (tmp_path / "said").read_text()
    assert said.count("stopped on request after step") == 1
    assert f"Continue with: lora train {config} --nproc 2" in said
    assert "Traceback" not in said
    assert run_dir.read_status(RunDir(tmp_path / "run"))["status"] == "stopped"
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_killed_process_is_named_and_all_are_started_again(make_config: Make, tmp_path: Path):
    """With --restarts the run ends with the bits of one that nobody disturbed."""
    config = make_config(**SETTINGS | {"train.epochs": 2})
    process = begin(config, tmp_path, "--restarts", 1)
    os.kill(ranks(process)[1], signal.SIGKILL)
    assert end(process) == 0
    said = (tmp_path / "said").read_text()
    disturbed = facts(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "disturbed")
    codes, _ = run_ranks(2, lambda rank: lora("train", config), tmp_path)

    assert "process 1 of 2 (counted from 0) was killed by SIGKILL" in said
    assert "Starting the 2 processes again (0 more times" in said
    assert codes == [0, 0]
    assert facts(tmp_path / "run") == disturbed


def test_what_needs_no_processes_starts_none(
    make_config: Make, undisturbed: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
):
    """A wrong config, --restarts alone, and another number than torchrun's are said by the process that is asked."""
    code, _, said = invoke("train", make_config(), "--nproc", 2, "lora.rnk=3")
    assert (code, "did you mean" in said) == (2, True)
    code, _, said = invoke("train", make_config(**{"data.train": "nowhere.jsonl"}), "--nproc", 2)
    assert (code, "nowhere.jsonl" in said) == (2, True)
    code, _, said = invoke("train", make_config(), "--restarts", 2)
    assert (code, "--nproc above 1" in said) == (2, True)
    config = undisturbed.parent / "config.yaml"
    code, out, _ = invoke("train", config, "--nproc", 2, "--json")
    assert (code, json.loads(out)["step"]) == (0, 12)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    code, _, said = invoke("train", make_config(), "--nproc", 4)
    assert (code, "one of 2 processes already" in said) == (2, True)
