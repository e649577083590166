"""What safety costs: the share of a run's wall time that storage takes for hashes, fsync, renames and reading back."""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lora_cli import config_file, manifest, room, storage, train
from lora_cli.interrupt import StopRequest

PLAIN = ("write_file", "append_line", "keep", "add_file", "add_copy", "make_folder", "remove_directory")
MANAGED = ("new_directory", "appending", "lock")


class Clock:
    """Time spent inside of storage; of calls within calls only the outermost counts."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is counted."""

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began
                    self.calls += 1

        return counted

    def managed(self, function: Callable[..., AbstractContextManager[Any]]) -> Callable[..., Any]:
        """Return a function whose context manager is counted where it begins and where it ends."""

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            manager = function(*arguments, **options)

            enter, leave = self.timed(manager.__enter__), self.timed(manager.__exit__)

            class Counted:
                def __enter__(self) -> Any:
                    return enter()

                def __exit__(self, *error: Any) -> Any:
                    return leave(*error)

            return Counted()

        return counted


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Train configs/quickstart.yaml (its model has to be there), `count` steps of it, and say what storage took."""
    clock = Clock()
    for name in PLAIN:
        setattr(storage, name, clock.timed(getattr(storage, name)))
    manifest.problems_in = clock.timed(manifest.problems_in)
    room.require_writable = clock.timed(room.require_writable)
    for name in MANAGED:
        setattr(storage, name, clock.managed(getattr(storage, name)))
    overrides = [f"output_dir={folder}/run", f"seed={seed}", *([f"train.max_steps={count}"] if count else [])]
    config = config_file.load(Path("configs/quickstart.yaml"), overrides)
    began = time.perf_counter()
    steps = sum(hasattr(event, "grad_norm") for event in train.train(config, StopRequest()))
    wall = time.perf_counter() - began
    share = clock.seconds / wall
    return {
        "tried": steps,
        "wall_seconds": round(wall, 1),
        "storage_seconds": round(clock.seconds, 2),
        "storage_calls": clock.calls,
        "share": round(share, 5),
        "failures": [f"storage takes {share:.1%} of the time"] if share > 0.01 else [],
    }
