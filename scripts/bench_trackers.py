"""What train.trackers cost: seconds of a step on a tiny model, trackers off and on in turns.

    python scripts/bench_trackers.py MODEL [--rounds 5] [--steps 60]

A step is timed from one to the next as the command sees them, so that all that is done between them counts; `whole` is
a run from its first event to its last, with the beginning and the end of the trackers.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from lora_cli import config_file, tracking
from lora_cli.interrupt import StopRequest
from lora_cli.records import StepDone
from lora_cli.train import train

TURNS = ("none", "tensorboard", "wandb", "mlflow")


def timed(folder: Path, model: str, tracker: str, steps: int) -> tuple[float, float]:
    """Return the median seconds between steps, and those of the whole run."""
    values = {
        "model": model,
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0},
        "train": {"max_steps": steps, "epochs": 100, "trackers": [] if tracker == "none" else [tracker]},
        "eval": {"general": False},
        "save": {"per_epoch": 1},
        "output_dir": str(folder / f"{tracker}-{time.monotonic_ns()}"),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    config = config_file.load(path)
    tracking.require(config)
    began, seen = time.perf_counter(), list[float]()
    for event in tracking.tracked(train(config, StopRequest()), config):
        if isinstance(event, StepDone):
            seen.append(time.perf_counter())
    between = [after - before for before, after in itertools.pairwise(seen)]
    return statistics.median(between), time.perf_counter() - began


def main() -> None:
    """Take turns, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    found: dict[str, list[tuple[float, float]]] = {turn: [] for turn in TURNS}
    with tempfile.TemporaryDirectory() as place:
        rows = [{"prompt": f"Count from {number}.", "completion": " one two three" * 4} for number in range(320)]
        (Path(place) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for _ in range(arguments.rounds):
            for turn in TURNS:
                found[turn].append(timed(Path(place), arguments.model, turn, arguments.steps))
    for turn, figures in found.items():
        steps, wholes = zip(*figures, strict=True)
        low, high = min(steps), max(steps)
        print(
            f"{turn:<12} {statistics.median(steps) * 1e3:6.2f} ms a step ({low * 1e3:.2f} to {high * 1e3:.2f}), "
            f"{statistics.median(wholes):5.2f} s a run of {arguments.steps} steps"
        )


if __name__ == "__main__":
    main()
