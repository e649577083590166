"""Disturb the program in every way that docs/reliability.md speaks of, and print what came of it as JSON.

    scripts/torture [PART ...] [--seed 0] [--count N] [--workers 1] [--folder DIR]

PART is one or more of those below; without one all are run, which takes hours. `--count` is how much of a part is tried
(0: all there is, of crash, agreement, faults and hostile); each part has its own default. The figures are one JSON
object; exit 1 where anything failed.
"""

import argparse
import importlib
import inspect
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARTS = {  # the count of each that docs/reliability.md reports
    "crash": 0,  # SIGKILL at every operation of storage; 0 is all there are
    "agreement": 0,  # ways to run a config, all of which have the same numbers
    "kills": 100,  # SIGKILL of whole processes at random times
    "ranks": 20,  # SIGKILL and SIGSTOP of one of two processes of a run
    "search": 20,  # SIGKILL of one of two processes that share a search
    "power": 2000,  # states that a power cut leaves
    "faults": 300,  # operations that the system refuses
    "rot": 5000,  # flipped bits; a tenth as many cut files
    "fuzz": 200_000,  # configs, and data lines; a tenth as many headers and manifests
    "hostile": 0,  # artefacts that want to run, to read or to hang
    "price": 0,  # what storage costs on the quickstart
}


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--workers", type=int, default=1, help="processes at once, in the parts that can")
    parser.add_argument("--folder", type=Path, help="where to work; /dev/shm is quick")
    asked = parser.parse_args()
    if wrong := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lora-torture-", dir=asked.folder) as folder:
        for part in asked.parts or PARTS:
            began = time.monotonic()
            run = importlib.import_module(f"torture.{part}").run
            more = {"workers": asked.workers} if "workers" in inspect.signature(run).parameters else {}
            place = Path(folder) / part
            place.mkdir()
            figures[part] = run(asked.seed, PARTS[part] if asked.count is None else asked.count, place, **more)
            figures[part]["seconds"] = round(time.monotonic() - began, 1)
            print(f"{part}: {figures[part]['tried']} tried, {len(figures[part]['failures'])} failed", file=sys.stderr)
    print(json.dumps(figures, indent=2))
    return int(any(part["failures"] for part in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
