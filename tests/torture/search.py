"""Two processes on one search, one of them killed again and again and started anew: no trial is lost or done twice."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli import storage
from torture import kills

_TRIALS = 12
_MOST = 6  # kills in one search
_BEGUN = 6.0  # seconds after which a process is at work
_SPREAD = 3.0  # seconds within which it is then killed
_PATIENCE = 300.0


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Kill `count` processes of as many searches as that takes; return what went wrong."""
    config = kills.write(folder)
    chance = random.Random(f"search:{seed}")
    failures, killed, searches = list[str](), 0, 0
    while killed < count and len(failures) < count:
        place, searches = folder / f"run-{searches}", searches + 1
        try:
            killed += _disturb(chance, config, place, min(_MOST, count - killed))
            failures += [f"search {searches}: {problem}" for problem in _problems(Path(f"{place}-tune"))]
        except (AssertionError, subprocess.SubprocessError, OSError, ValueError) as error:
            failures.append(f"search {searches}: {type(error).__name__}: {str(error)[-300:]}")
    return {"tried": killed, "searches": searches, "failures": failures}


def _disturb(chance: random.Random, config: Path, place: Path, times: int) -> int:
    """Search with two processes, kill one after the other as often, and let the search end; return how often."""
    settings = ["train.epochs=3", "eval.general=false", f"tune.trials={_TRIALS}", f"output_dir={place}"]
    command = [sys.executable, "-m", "lora_cli", "tune", str(config), *settings]

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    processes, killed = [start(), start()], 0
    for _ in range(times):
        time.sleep(_BEGUN + chance.uniform(0.0, _SPREAD))
        victim = chance.randrange(2)
        if processes[victim].poll() is None:
            processes[victim].send_signal(signal.SIGKILL)
            killed += 1
        processes[victim].wait()
        processes[victim] = start()
    codes = [process.wait(_PATIENCE) for process in processes]
    assert codes == [0, 0], f"ended with {codes}"
    kills.finish(command)
    return max(1, killed)


def _problems(place: Path) -> Iterator[str]:
    """Iterate over what a search's folder should not say."""
    report = json.loads((place / "tune.json").read_text())
    numbers = [trial["number"] for trial in report["trials"]]
    if numbers != sorted(set(numbers)) or len(numbers) != _TRIALS or report["running"]:
        yield f"trials {numbers}, {report['running']} running"
    if report["final"] is None:
        yield "the best was not trained"
    for trial in report["trials"]:
        run = place / "trials" / f"{trial['number']:04d}"
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [record["step"] for record in records if record["event"] == "step"]
        if steps != list(range(1, trial["steps"] + 1)):
            yield f"trial {trial['number']}: steps {steps}"
    if left := [path.name for path in place.rglob(".*") if storage.is_temporary(path)]:
        yield f"left half-written: {left}"
