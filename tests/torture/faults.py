"""Faults of the disk, one a trial: a call that changes the run's folder fails, or the room ends; then it is run again.

Each trial is a process forked from this one. A fault may end a run with exit code 3 only; what was saved before stays
whole, nothing temporary is left, and the same command ends with the bytes of a run that nothing disturbed.
"""

import ctypes
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import conversation, facts, save_base, write_rows

from lora_cli import config_file, ending, manifest, run_dir, storage
from lora_cli.interrupt import StopRequest
from lora_cli.records import StepDone
from lora_cli.run_dir import RunDir
from lora_cli.train import train

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
# Audit events of calls that change a folder, and where their arguments hold (path, folder's descriptor).
_CALLS = {"open": (0, None), "os.mkdir": (0, 2), "os.rename": (0, 2), "os.link": (0, 2), "os.chmod": (0, 2)}
_DELETING = {"os.remove": (0, 1), "os.rmdir": (0, 1)}
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000  # of unshare(2)
READ_ONLY = 1  # of mount(2)


@dataclass(frozen=True)
class Fault:
    """What goes wrong. `call`: the number-th call that changes the folder, with an error; `resume`: that which reads or
    changes it, of a run that goes on; `size`: files of at most so many bytes; `room`: after the number-th event only
    `size` bytes are free.
    """

    kind: str
    number: int = 0
    error: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {errno.errorcode.get(self.error, '')} {self.size}"


class Calls:
    """Counts the calls that change a folder, and has one of them fail."""

    def __init__(self, folder: Path, inputs: Path, fails: Fault | None) -> None:
        self.read = fails is not None and fails.kind == "resume"
        self.folder, self.fails, self.count, self.failed = str(folder), fails, 0, ""
        self.inputs, self.opened = str(inputs), set[str]()
        self._fsync = os.fsync
        os.fsync = self._synced  # it has no audit event
        sys.addaudithook(self._called)

    def _called(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CALLS or event in _DELETING:
            at, folder_at = (_CALLS | _DELETING)[event]
            path = arguments[at]
            if event == "open" and str(path).startswith(self.inputs):
                self.opened.add(Path(path).name)
            if event == "open" and not self.read and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if isinstance(path, int):
                path = f"/proc/self/fd/{path}"
            elif folder_at is not None and arguments[folder_at] not in (-1, None):
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[folder_at]}"), os.fsdecode(path))
            self._count(event, os.fsdecode(path))

    def _synced(self, descriptor: Any) -> None:
        self._count("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)

    def _count(self, call: str, path: str) -> None:
        if path.startswith(self.folder):
            self.count += 1
            if self.fails is not None and self.count == self.fails.number:
                self.failed = f"{call} {path.removeprefix(self.folder)}"
                raise OSError(self.fails.error, os.strerror(self.fails.error), path)


@dataclass(frozen=True)
class Place:
    """A folder in which a run is tried: its config, its run directory, what it said."""

    folder: Path
    inputs: Path  # with base and rows
    name: str = "said"

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "run")

    @property
    def said(self) -> Path:
        return self.folder / f"{self.name}.txt"

    def copied(self, folder: Path) -> "Place":
        """Return a place with a copy of this one's run."""
        shutil.copytree(self.folder, folder)
        return Place(folder, self.inputs)

    def config(self) -> Path:
        """Write a config of four steps and two checkpoints, the older of which is deleted."""
        values = {
            "model": {"path": str(self.inputs / "base")},
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "data": {"train": str(self.inputs / "rows.jsonl"), "validation": 4},
            "train": {"batch_size": 4, "learning_rate": 0.02, "epochs": 1, "micro_batch_tokens": 256},
            "eval": {"general": False, "per_epoch": 2},
            "save": {"per_epoch": 4, "keep": 1},
            "output_dir": str(self.run.path),
        }
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(values))
        return path


def prepare(folder: Path) -> Path:
    """Write the base and the rows that all trials share; return their folder."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    save_base("llama", inputs / "base", hidden_size=16, intermediate_size=16)
    write_rows(inputs / "rows.jsonl", [conversation(number) for number in range(20)])
    return inputs


def forked(function: Callable[[], int]) -> int:
    """Return the exit code of a function in a process of its own."""
    return code_of(begun(function))


def code_of(child: int) -> int:
    """Wait for a process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(function: Callable[[], int]) -> int:
    """Return the process in which a function runs, whose result is its exit code."""
    child = os.fork()
    if child:
        return child
    try:
        code = function()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def train_in(place: Place, fault: Fault | None = None, filled: Path | None = None) -> int:
    """Train in this process, which ends; the exit code is the program's. What was counted is the last line it says."""
    began = time.process_time()
    said = place.said.open("w", buffering=1)
    sys.stdout = sys.stderr = said
    config = place.config()
    torch.set_num_threads(1)  # a forked process has none of its parent's
    torch.cuda.is_available = lambda: False  # nor its GPU
    calls = Calls(place.run.path, place.inputs, fault if fault and fault.kind in ("call", "resume") else None)
    if fault and fault.kind == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))

    def command() -> None:
        stop = StopRequest()
        for number, event in enumerate(train(config_file.load(config), stop)):
            if fault and filled and number == fault.number:
                _fill(filled, fault.size)
            if fault and fault.kind == "stop" and isinstance(event, StepDone) and event.step == fault.number:
                stop.signal_number = signal.SIGINT

    sys.argv = ["lora", "train", str(config)]
    try:
        ending.run(command)
    finally:
        seconds = time.process_time() - began
        what = {"calls": calls.count, "failed": calls.failed, "inputs": sorted(calls.opened), "seconds": seconds}
        said.write("\n" + json.dumps(what))
        said.close()
    return 0


def _fill(path: Path, left: int) -> None:
    """Leave a number of bytes free on the disk of a file."""
    free = shutil.disk_usage(path.parent).free
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, free - left))


def counted(place: Place) -> dict[str, Any]:
    """Return what the last process counted there."""
    last: dict[str, Any] = json.loads(place.said.read_text().splitlines()[-1])
    return last


def _damage(place: Place, failed: str) -> Iterator[str]:
    """Iterate over what is not as it has to be after a fault."""
    for sealed in [*(path for _, path in run_dir.step_folders(place.run)), place.run.adapter]:
        if sealed.exists():
            yield from manifest.problems_in(sealed)
    if place.run.path.exists() and failed.split(" ")[0] not in _DELETING:  # what could not be deleted is there
        yield from (f"{path.name} is left" for path in place.run.path.rglob("*") if storage.is_temporary(path))


def trial(place: Place, fault: Fault, expected: Any, filled: Path | None = None) -> list[str]:
    """Return what went wrong when a run met a fault and was started again."""
    code = forked(lambda: train_in(place, fault, filled))
    text = place.said.read_text()
    wrong = [] if code in (0, 3) else [f"exit code {code}: {text[-300:]}"]
    if code == 3 and str(place.run.path) not in text:
        wrong.append(f"the message names no path: {text[-300:]}")
    failed = str(counted(place)["failed"])
    wrong += _damage(place, failed)
    if filled:
        filled.unlink(missing_ok=True)
    if (code := forked(lambda: train_in(place))) != 0:
        wrong.append(f"the rerun ended with {code}: {place.said.read_text()[-300:]}")
    elif facts(place.run.path) != expected:
        wrong.append("the rerun has other bytes")
    return [f"{fault} ({failed}): {what}" for what in wrong]


def small_disk(folder: Path, size: int, flags: int = 0) -> bool:
    """Mount a disk of a size at a folder, for this process and its children; return whether the machine allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)):
        return False
    names = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"} if user else {}
    try:
        for name, text in names.items():
            Path(f"/proc/self/{name}").write_text(text)
    except OSError:
        return False
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: nobody else sees it
    return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode()) == 0


_NO_MOUNT = 77


def _on_small_disk(place: Place, fault: Fault, expected: Any, result: Path) -> int:
    place.folder.mkdir()
    if not small_disk(place.folder, 4 << 20):
        return _NO_MOUNT
    result.write_text(json.dumps(trial(place, fault, expected, place.folder / "filled")))
    return 0


def faults(calls: int, calls_of_resume: int, largest: int) -> list[Fault]:
    """Return every fault there is: each call with each error, each size of file, the end of room after each event."""
    found = [Fault("call", number, error) for number in range(1, calls + 1) for error in ERRORS]
    found += [Fault("resume", number, errno.EIO) for number in range(1, calls_of_resume + 1)]
    found += [Fault("size", size=size) for size in range(0, largest, 256)]
    return found + [Fault("room", number, size=size) for number in range(8) for size in range(0, 40_000, 4096)]


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Try `count` faults (0: all), drawn by a seed; return {"tried", "possible", "without_mount", "failures"}."""
    inputs = prepare(folder)
    straight = Place(folder / "straight", inputs)
    straight.folder.mkdir()
    assert forked(lambda: train_in(straight)) == 0, straight.said.read_text()
    expected = facts(straight.run.path)
    largest = max(path.stat().st_size for path in straight.run.path.rglob("*") if path.is_file())
    calls = counted(straight)["calls"]
    half = Place(folder / "half", inputs)
    half.folder.mkdir()
    assert forked(lambda: train_in(half, Fault("stop", 2))) == 130, half.said.read_text()
    going_on = half.copied(folder / "going-on")
    assert forked(lambda: train_in(going_on, Fault("resume"))) == 0, going_on.said.read_text()
    possible = faults(calls, counted(going_on)["calls"], largest)
    chosen = random.Random(seed).sample(possible, min(count or len(possible), len(possible)))
    failures: list[str] = []
    without_mount = 0
    for number, fault in enumerate(chosen):
        place = Place(folder / f"trial-{number}", inputs)
        if fault.kind == "room":
            result = folder / "result.json"
            code = forked(lambda: _on_small_disk(place, fault, expected, result))  # noqa: B023 - run at once
            without_mount += code == _NO_MOUNT
            failures += (
                json.loads(result.read_text()) if code == 0 else [] if code == _NO_MOUNT else [f"{fault}: {code}"]
            )
        else:
            if fault.kind == "resume":
                half.copied(place.folder)
            else:
                place.folder.mkdir()
            failures += trial(place, fault, expected)
        shutil.rmtree(place.folder)
    return {"tried": len(chosen), "possible": len(possible), "without_mount": without_mount, "failures": failures}
