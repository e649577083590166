"""How long the program takes to say what is wrong with a config, and with rows.

    python scripts/bench_errors.py [--megabytes 8]

Each config of the catalogue (tests/bad/config.yaml) is given to a fresh process; the time is that of the process, by
the clock and on the processor, less that of an interpreter that does nothing. The rows are a file whose last line is
cut off; the first 8 MiB of each file are looked at before the model is. Other work on the machine makes the clock's
times longer, the processor's hardly.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bad_cases import FOUR_LINES, cases, prepare  # noqa: E402 - the tests are no package

LINE = '{"text": "' + "It is a long way to the end of this line. " * 20 + '"}\n'


def run(folder: Path, *arguments: str) -> tuple[float, float]:
    """Run Python in a folder; return seconds by the clock and on the processor."""
    began, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)
    after = os.times()
    assert done.returncode in (0, 2), done.stderr
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


def show(what: str, times: list[tuple[float, float]], least: tuple[float, float]) -> None:
    """Print the median and the most of some times."""
    for name, values, nothing in zip(("clock", "processor"), zip(*times, strict=True), least, strict=True):
        over = [value - nothing for value in values]
        print(f"{what} ({len(over)}), {name}: median {statistics.median(over):.3f} s, most {max(over):.3f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=8)
    megabytes = parser.parse_args().megabytes
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as name:
        least = min(run(Path(name), "-c", "pass") for _ in range(5))
        times = []
        for number, parameter in enumerate(cases("config")):
            (case,) = parameter.values
            if "command" not in case:
                folder = Path(name) / str(number)
                folder.mkdir()
                prepare(case, folder, None)
                times.append(run(folder, "-m", "lora_cli", "train", "config.yaml"))
        show("configs", times, least)
        (Path(name) / "config.yaml").write_text(FOUR_LINES)
        (Path(name) / "rows.jsonl").write_text(LINE * int(megabytes * 1e6 / len(LINE)) + '{"text": "a\n')
        show(f"{megabytes:g} MB of rows", [run(Path(name), "-m", "lora_cli", "train", "config.yaml")], least)


if __name__ == "__main__":
    main()
