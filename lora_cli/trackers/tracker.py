"""What every tracker is given, and what it can do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT = "lora"  # what runs are put under where nothing else is asked for

NOTHING = -1  # the step of a tracker that holds nothing yet: the base is measured at step 0


@dataclass(frozen=True)
class Known:
    """What is remembered of a tracked run in its run directory: an id of ours, and up to which step it is whole."""

    id: str = ""
    step: int = NOTHING


NEW = Known()


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it: its folder, its name, its config by dotted keys, and what was known of it before."""

    place: Path
    name: str
    settings: Mapping[str, Any]
    known: Known


class Tracker(Protocol):
    """A place that a run's figures are sent to. All of it is called in one thread, and may raise anything."""

    address: str | None  # where a browser finds it

    def start(self, step: int) -> int:
        """Begin or continue the tracked run, of a run at a step; return the last step that it holds for good."""

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, all of them at once."""

    def flush(self) -> None:
        """Have what was recorded survive this process, where that is for the tracker to do."""

    def end(self, status: str, reason: str) -> None:
        """End the tracked run: finished | stopped | failed, and why."""
