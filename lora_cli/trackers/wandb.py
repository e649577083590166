# mypy: disable-error-code="import-untyped, attr-defined, no-untyped-call"
"""Weights & Biases: by its own environment variables online, or (WANDB_MODE=offline) as files in the run directory.

An offline run's file is a log of protocol buffers in LevelDB's format: after 7 bytes, blocks of 32 KiB with pieces of
(checksum, length, kind), https://github.com/google/leveldb/blob/main/doc/log_format.md. A killed process leaves what
had been written of it, so that is looked at when a run goes on.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_SILENT", "true")  # read when it is imported
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb
from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

from lora_cli.trackers.tracker import NOTHING, PROJECT, TrackedRun

FOLDER = "wandb"
_LONGEST_END_SECONDS = 30.0
_HEAD, _BLOCK, _PIECE = 7, 1 << 15, struct.Struct("<4xHB")  # a piece's checksum is passed over
_WHOLE, _LAST = 1, 4  # kinds of pieces that end a record


def problem() -> str | None:
    """Return why nothing could be sent: there is no login. Offline none is needed."""
    if os.environ.get("WANDB_API_KEY"):
        return None
    try:
        is_online = wandb.setup().settings.mode in (None, "online", "shared")
        if is_online and wandb.login(prompt=False) is False:
            return "there is no login here: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    except wandb.Error:  # a login that cannot be tried is said when the run begins
        pass
    finally:
        wandb.teardown()  # it leaves a thread, and processes are forked after this
    return None


class WeightsAndBiases:
    """One row of history for each step."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self.address: str | None = None

    def start(self, step: int) -> int:
        """Begin a run, or continue the one that is known."""
        held = _held(self._run.place / FOLDER, self._run.known.id)
        self._tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=os.environ.get("WANDB_DIR") or self._run.place,
            id=self._run.known.id,
            name=self._run.name,
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,  # an address in it may hold a password
                disable_code=True,
                save_code=False,
                x_disable_meta=True,  # the command's arguments
                x_save_requirements=False,
                finish_timeout=_LONGEST_END_SECONDS,
            ),
        )
        self._tracked.config.update(dict(self._run.settings), allow_val_change=True)
        self.address = None if self._tracked.offline else self._tracked.url
        return self._tracked.starting_step - 1 if self._tracked.resumed else held

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand the row to its own process."""
        self._tracked.log(dict(figures), step=step, commit=True)

    def flush(self) -> None:
        """Its own process writes when it likes; what a killed one had not written is found missing."""

    def end(self, status: str, reason: str) -> None:
        """Say how it ended, and wait for what is still to be sent."""
        self._tracked.summary.update({"status": status, "reason": reason})
        self._tracked.finish(exit_code=int(status == "failed"))


def _held(folder: Path, known: str) -> int:
    """Return the last step in the offline files of a run."""
    return max(
        (step for file in folder.glob(f"offline-run-*/run-{known}.wandb") for step in _steps(file)), default=NOTHING
    )


def _steps(file: Path) -> Iterator[int]:
    for data in _records(file.read_bytes()):
        with contextlib.suppress(DecodeError):
            record: Any = Record.FromString(data)
            if record.HasField("history"):
                yield record.history.step.num


def _records(data: bytes) -> Iterator[bytes]:
    """Iterate over the whole records of a log, whose end may be missing."""
    at, record = _HEAD, b""
    while at + _PIECE.size <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _PIECE.size:
            at += left
            continue
        size, kind = _PIECE.unpack_from(data, at)
        at += _PIECE.size
        record += data[at : at + size]
        at += size
        if kind in (_WHOLE, _LAST) and at <= len(data):
            yield record
            record = b""
