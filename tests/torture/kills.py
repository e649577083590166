"""Whole training processes killed at random moments, then the same command again until it is done: nothing differs."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import conversation, facts, save_base, write_rows

from lora_cli import storage
from lora_cli.run_dir import RunDir, read_status

PHASES = ("start", "step", "evaluating", "saving", "end")
_STEPS, _EVERY = 12, 3  # of a run, and of them those with a validation
_MOST_KILLS = 2  # of one run
_RANKED = 5  # every fifth run has two processes
_PATIENCE = 300.0  # seconds in which a run is done, or torchrun has ended what is left of one
_ORPHAN_SECONDS = 10.0


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Disturb `count` runs; return how often each phase was hit, and every run that did not end as it should."""
    config = write(folder)
    undisturbed: dict[int, Any] = {}
    hit, failures = Counter[str](), list[str]()
    for trial in range(count):
        ranks = 2 if trial % _RANKED == _RANKED - 1 else 1
        if ranks not in undisturbed:
            whole = folder / f"whole-{ranks}"
            finish(_command(config, ranks, whole))
            undisturbed[ranks] = ended(whole)
        place = folder / f"run-{trial}"
        try:
            _disturb(random.Random(f"{seed}:{trial}"), _command(config, ranks, place), place, ranks, hit)
            if (end := ended(place)) != undisturbed[ranks]:
                names = ("metrics", "files", "run.json", "temporaries")
                parts = [name for name, a, b in zip(names, end, undisturbed[ranks], strict=True) if a != b]
                failures.append(f"run {trial} ({ranks} ranks): another end in {', '.join(parts)}")
        except (AssertionError, subprocess.SubprocessError, TimeoutError) as error:
            failures.append(f"run {trial} ({ranks} ranks): {type(error).__name__}: {str(error)[-300:]}")
    return {"tried": count, "kills": dict(sorted(hit.items())), "failures": failures}


def write(folder: Path) -> Path:
    """A run of twelve steps in about a second: dropout, validation, general text, and saves between validations."""
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(32)])
    values = {
        "model": str(save_base("llama", folder / "base")),
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": rows, "validation": 8},
        "train": {"batch_size": 4, "learning_rate": 0.01, "epochs": 2, "micro_batch_tokens": 64},
        "eval": {"per_epoch": 2, "general_tokens": 512},
        "save": {"per_epoch": 3},
        "output_dir": "unset",
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def _command(config: Path, ranks: int, place: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "lora_cli", "train", str(config), f"output_dir={place}"]


def finish(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    assert done.returncode == 0, done.stderr


def _disturb(chance: random.Random, command: Sequence[str], place: Path, ranks: int, hit: Counter[str]) -> None:
    """Kill a run once or twice, each time in another way, and let it then end; nothing of it may live on."""
    for _ in range(chance.randint(1, _MOST_KILLS)):
        phase = chance.choice(PHASES)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _await(chance, phase, place, process)
        victim, name = _victim(chance, process.pid, ranks)
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
            hit[f"{phase}, {name}"] += 1
        process.wait(timeout=_PATIENCE)
        end = time.monotonic() + _ORPHAN_SECONDS
        while processes_of(place):
            assert time.monotonic() < end, f"still alive after {phase}, {name}: {processes_of(place)}"
            time.sleep(0.02)
    finish(command)


def _await(chance: random.Random, phase: str, place: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a run is in a phase, or has ended."""
    metrics, step = place / "metrics.jsonl", chance.randint(1, _STEPS)

    def reached(event: str) -> bool:
        return metrics.exists() and any(
            record.get("event") == event and record["step"] >= step for record in _records(metrics)
        )

    signs: dict[str, Callable[[], bool]] = {
        "start": lambda: False,
        "step": lambda: reached("step"),
        "evaluating": lambda: reached("step") and any(_is_due(record) for record in _records(metrics)[-1:]),
        "saving": lambda: any(map(storage.is_temporary, place.glob("checkpoints/.*"))),
        "end": lambda: metrics.exists() and any(r["step"] == _STEPS for r in _records(metrics)),
    }
    delay = chance.uniform(0.0, 6.0 if phase == "start" else 0.05)
    begin = time.monotonic()
    while process.poll() is None and not signs[phase]():
        if phase == "start" and time.monotonic() - begin > delay:
            return
        time.sleep(0.003)
    time.sleep(delay if phase in ("step", "evaluating", "end") else 0.0)


def _is_due(record: dict[str, Any]) -> bool:
    """Whether a validation follows what was written down last."""
    return record["event"] == "step" and record["step"] % _EVERY == 0


def _records(metrics: Path) -> list[dict[str, Any]]:
    whole = metrics.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _victim(chance: random.Random, started: int, ranks: int) -> tuple[int, str]:
    """Whom to kill: the process; of several one of the ranks, or torchrun itself."""
    if ranks == 1:
        return started, "alone"
    children = sorted(pid for pid, parent, _ in processes() if parent == started)
    victims = [(started, "torchrun"), *zip(children, (f"rank {rank}" for rank in itertools.count()), strict=False)]
    return chance.choice(victims)


def processes() -> list[tuple[int, int, str]]:
    """(process, parent, command line) of all that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if state != "Z":
            found.append((int(folder.name), int(parent), line))
    return found


def processes_of(place: Path) -> list[int]:
    return [pid for pid, _, line in processes() if line.rstrip().endswith(f"output_dir={place}")]


def ended(place: Path) -> tuple[Any, ...]:
    """What must be the same: metrics, adapter, newest checkpoint, run.json, and what is left half-written: nothing."""
    left = sorted(path.name for path in place.rglob("*") if storage.is_temporary(path))
    return *facts(place), read_status(RunDir(place)), left
