"""Measure what several processes bring on this machine: tokens a second and peak memory of `lora train`.

    python scripts/bench_ranks.py [--config configs/quickstart.yaml] [--rounds 3] [--steps 10]

Each round trains a few steps in one process with all processors, in one with a single thread, and in as many processes
as there are processors, of one thread each. The first two steps are left out. Ratios are taken within a round.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

WARM_UP = 2  # steps


@dataclass(frozen=True)
class Way:
    """How a run is started."""

    processes: int
    threads: int

    def __str__(self) -> str:
        """Name it as a row of the table."""
        ending = "es" if self.processes > 1 else ""
        return f"{self.processes} process{ending} x {self.threads} thread{'s' if self.threads > 1 else ''}"


def ranks(process: int) -> list[int]:
    """The processes of a launcher that train, or the process itself where it is alone."""
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout
    return [int(number) for number in listed.split()] or [process]


def peak(process: int) -> int:
    """The largest memory that a process has had, in bytes; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(way: Way, config: str, steps: int) -> tuple[float, int]:
    """Train a few steps; return tokens a second, and the peak memory of the largest process."""
    with tempfile.TemporaryDirectory(prefix="lora-bench-") as folder:
        command = [sys.executable, "-m", "lora_cli", "train", config, "--nproc", str(way.processes)]
        command += [f"train.max_steps={steps}", "data.validation=0", "eval.general=false", f"output_dir={folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": str(way.threads), "HF_HUB_OFFLINE": "1"}
        largest = 0
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.poll() is None:
                largest = max(largest, *map(peak, ranks(process.pid)))
                time.sleep(0.25)
            said = process.stderr.read().decode() if process.stderr else ""
        if process.returncode:
            raise SystemExit(f"{way}: exit {process.returncode}\n{said[-2000:]}")
        lines = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        taken = [line for line in lines if line["event"] == "step"][WARM_UP:]
    return sum(step["tokens"] for step in taken) / sum(step["seconds"] for step in taken), largest


def main() -> None:
    """Measure every way in turn, some rounds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    count = os.cpu_count() or 1
    ways = [Way(1, count), Way(1, 1), Way(count, 1)]
    rounds = []
    for number in range(asked.rounds):
        rounds.append([measure(way, asked.config, asked.steps) for way in ways])
        speeds = ", ".join(f"{way}: {speed:.0f} tokens/s" for way, (speed, _) in zip(ways, rounds[-1], strict=True))
        print(f"round {number + 1}: {speeds}", file=sys.stderr, flush=True)
    print("| | tokens/s | times the first | peak memory of a process |\n|---|---|---|---|")
    for place, way in enumerate(ways):
        speed = statistics.median(one[place][0] for one in rounds)
        ratio = statistics.median(one[place][0] / one[0][0] for one in rounds)
        memory = max(one[place][1] for one in rounds) / 2**30
        print(f"| {way} | {speed:.0f} | {ratio:.2f} | {memory:.2f} GiB |")


if __name__ == "__main__":
    main()
