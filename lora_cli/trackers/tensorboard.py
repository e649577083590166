# mypy: disable-error-code="import-untyped"
"""TensorBoard: event files in the run directory, for `tensorboard --logdir`; written without torch or TensorFlow.

A run that goes on says from which step on: readers forget what they read from there on (SessionLog.START in
tensorboard/compat/proto/event.proto, and `_Purge` in its event_accumulator.py).
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lora_cli.trackers.tracker import NOTHING, TrackedRun

FOLDER = "tensorboard"


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, a second at most, until a new file's name sorts behind those there: readers go by the seconds in it."""
    seconds = [found[1] for file in folder.glob("events.*") if (found := re.search(r"tfevents\.(\d+)", file.name))]
    time.sleep(min(1.0, max(0.0, max(map(int, seconds), default=0) + 1 - time.time())))


class TensorBoard:
    """Scalars by their names, and config and end as text."""

    address: str | None = None

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._step = 0
        self._writer: Any = None

    def start(self, step: int) -> int:
        """Begin an event file behind those that are there; what they hold after the step returned is forgotten."""
        folder = self._run.place / FOLDER
        held = min(self._run.known.step, step) if folder.is_dir() else NOTHING
        _wait_for_a_later_name(folder)
        self._writer = EventFileWriter(str(folder))
        self._step = held + 1
        self._add(session_log=SessionLog(status=SessionLog.START))
        self._text("config", "\n".join(f"    {key}: {value}" for key, value in self._run.settings.items()))
        return held

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one event."""
        self._step = step
        self._add(summary=Summary(value=[Summary.Value(tag=tag, simple_value=one) for tag, one in figures.items()]))

    def flush(self) -> None:
        """Write what is still in memory."""
        self._writer.flush()

    def end(self, status: str, reason: str) -> None:
        """Write how it ended, and close the file."""
        self._text("status", f"{status}: {reason}")
        self._writer.close()

    def _text(self, tag: str, text: str) -> None:
        """Write a text as TensorBoard's text plugin reads it."""
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto())
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(summary=Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)]))

    def _add(self, **what: Any) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=self._step, **what))
