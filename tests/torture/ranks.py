"""One of two processes of a run killed or halted, again and again: the other is soon gone, and the end the same.

torchrun starts both again. It would end a halted process only after half a minute, so that is done here.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lora_cli.run_dir import RunDir, read_status
from torture import kills

BAR = 15.0  # seconds in which the other process is gone
_MOST = 2  # disturbances of one run
_SPREAD = 2.0  # seconds after the first step, in which they come
_PATIENCE = 120.0
_WHAT = {signal.SIGKILL: "killed", signal.SIGSTOP: "halted"}


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Disturb runs `count` times; return the seconds in which the other process was gone, and what went wrong."""
    config = kills.write(folder)
    kills.finish(_command(config, folder / "whole"))
    undisturbed = kills.ended(folder / "whole")
    chance = random.Random(f"ranks:{seed}")
    seconds: dict[str, list[float]] = {what: [] for what in _WHAT.values()}
    failures, trial = list[str](), 0
    while (left := count - sum(map(len, seconds.values()))) > 0 and len(failures) < count:
        place, trial = folder / f"run-{trial}", trial + 1
        try:
            for what, took in _disturb(chance, config, place, min(left, chance.randint(1, _MOST))):
                seconds[what].append(took)
                if took > BAR:
                    failures.append(f"{place.name}: the other was there {took:.1f} s after one was {what}")
            if kills.ended(place) != undisturbed:
                failures.append(f"{place.name}: another end")
        except (AssertionError, subprocess.SubprocessError, TimeoutError) as error:
            failures.append(f"{place.name}: {type(error).__name__}: {str(error)[-300:]}")
    figures = {
        what: {"times": len(took), "median": round(statistics.median(took), 2), "largest": round(max(took), 2)}
        for what, took in seconds.items()
        if took
    }
    return {"tried": sum(map(len, seconds.values())), "runs": trial, "gone": figures, "failures": failures}


def _command(config: Path, place: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    return [sys.executable, *launcher, "-m", "lora_cli", "train", str(config), "train.epochs=6", f"output_dir={place}"]


def _disturb(chance: random.Random, config: Path, place: Path, times: int) -> list[tuple[str, float]]:
    """Disturb a run and let it end; return what was done to a process, and the seconds that the other stayed."""
    found = []
    with subprocess.Popen(_command(config, place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            seen: set[int] = set()
            for _ in range(times):
                ranks = _await_ranks(process, place, seen)
                time.sleep(chance.uniform(0.0, _SPREAD))
                if not ranks or not all(map(_lives, ranks)):  # the run has ended
                    break
                found.append(_disturb_one(chance, ranks))
                seen |= set(ranks)
            assert process.wait(timeout=_PATIENCE) == 0, f"torchrun ended with {process.returncode}"
        finally:
            process.kill()  # and with it what it started
    assert not kills.processes_of(place), "a process lives on"
    return found


def _disturb_one(chance: random.Random, ranks: list[int]) -> tuple[str, float]:
    """Kill or halt one of two processes and wait for the end of the other; return which, and the seconds it took."""
    victim, sent = chance.randrange(2), chance.choice(list(_WHAT))
    began = time.monotonic()
    os.kill(ranks[victim], sent)
    while _lives(ranks[1 - victim]) and time.monotonic() - began < _PATIENCE:
        time.sleep(0.01)
    took = time.monotonic() - began
    if sent == signal.SIGSTOP:
        os.kill(ranks[victim], signal.SIGKILL)
    return _WHAT[sent], took


def _await_ranks(process: "subprocess.Popen[bytes]", place: Path, seen: set[int]) -> list[int]:
    """Wait until new processes of a run take steps; return their numbers, by rank, or none where the run ended."""
    end = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < end:
        ranks = sorted(pid for pid, parent, _ in kills.processes() if parent == process.pid and pid not in seen)
        status = read_status(RunDir(place)) if (place / "run.json").exists() else {}
        if len(ranks) == 2 and status.get("status") == "running" and status.get("pid") == ranks[0]:
            return ranks
        time.sleep(0.05)
    return []


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
