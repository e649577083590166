"""Where this process runs: its device, and the other processes (ranks) of its run with what they tell each other.

Only tensors and JSON travel, no pickle. Ranks are replicas: each has the whole model and the same state.
"""

import contextlib
import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import rendezvous

from lora_cli import heartbeat, launch
from lora_cli.errors import InputError, SurroundingsError

_MEET = timedelta(minutes=30)
_ANSWER = timedelta(days=7)  # the main rank may prepare or write for long; heartbeats tell who is gone


@dataclass(frozen=True)
class World:
    """What this process runs on, and the ranks of its run. All of them have to make the same calls in the same order.

    Raises SurroundingsError where another rank ended; where one is halted, the process ends.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """Replace values by their sums over all ranks; the same bits on each."""
        self._reduce(values, dist.ReduceOp.SUM)
        return values

    def largest(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        found = torch.tensor(number)
        self._reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, however long one takes to give it."""
        raw = json.dumps(value).encode()
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(raw)
        self._reduce(lengths, dist.ReduceOp.SUM)
        padded = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
        padded[self.rank, : len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        self._reduce(padded, dist.ReduceOp.SUM)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(padded, lengths, strict=True)]

    def from_main(self, value: Any = None) -> Any:
        """Return the main rank's value; also how the others wait until it comes here, however long that takes."""
        if self.size == 1:
            return value
        raw = json.dumps(value).encode() if self.is_main else b""
        with self._answered():
            length = torch.tensor(len(raw))
            dist.broadcast(length, 0)
            content = torch.tensor(list(raw), dtype=torch.uint8) if self.is_main else torch.empty(int(length)).byte()
            dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main rank, and on the others when it is through there."""
        if not self.is_main:
            self.from_main()
        yield
        if self.is_main:
            self.from_main()

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise InputError where another rank has other facts than the main one."""
        of_ranks = self.gather(dict(facts))
        if problems := [
            f"process {rank} has another {name} than process 0 ({theirs[name][:80]}, there {of_ranks[0][name][:80]})."
            for rank, theirs in enumerate(of_ranks)
            for name in facts
            if theirs[name] != of_ranks[0][name]
        ]:
            raise InputError(*problems, "All processes of a run have to see the same files.")

    def _reduce(self, values: Tensor, operation: Any) -> None:
        if self.size > 1:
            with self._answered():
                dist.all_reduce(values, operation)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            reason = re.sub(r"^\[[^]]*\] ", "", last).split(". ")[0]  # without gloo's own file and line, and its advice
            raise SurroundingsError(
                f"process {self.rank}: another of the {self.size} processes of this run ended: "
                f"{reason[:120].rstrip('.')}.",
                state="What was saved is whole; the same command continues from there.",
            ) from error


ALONE = World(torch.device("cpu"))


def memory_error(error: BaseException) -> SurroundingsError | None:
    """Return what to tell the user when an error means that memory ran out, else None."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text:
        return SurroundingsError(
            f"memory ran out: {text[:200]}",
            "Set train.micro_batch_tokens lower (no number of the run changes), or data.max_length.",
            state="The step was not applied; the same command continues from the last checkpoint.",
        )
    return None


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        most, taken = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - taken)
    return free


def keep_freed_memory() -> None:
    """Have this process keep the memory it frees for its next tensors, where the C library is glibc.

    That library gives large blocks back to the system, and a step would get them anew and zeroed, page by page.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            adjust = ctypes.CDLL(None).mallopt  # the numbers are those of glibc's malloc.h
            adjust(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: no block is a mapping by itself
            adjust(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the end is kept


def current_world() -> World:
    """Return the world of a command that runs in one process."""
    return World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Meet the other ranks that torchrun started, and be one of them while the block runs; alone where it did not.

    Raises SurroundingsError where the environment makes no sense, or has more ranks than there are devices.
    """
    started = launch.current()
    if started.size == 1:
        yield current_world()
        return
    launch.die_with(os.getppid())
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if started.local_rank >= (count := torch.cuda.device_count()):
            raise SurroundingsError(
                f"This machine has fewer GPUs ({count}) than processes: --nproc-per-node must be at most {count}."
            )
        device, backend = torch.device("cuda", started.local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as stack:
        stack.callback(_part)
        try:
            store, rank, size = next(rendezvous("env://", timeout=_MEET))
            stack.enter_context(heartbeat.beating(store.clone(), started))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_ANSWER)
        except (RuntimeError, ValueError) as error:
            raise SurroundingsError(f"The {started.size} processes could not meet: {str(error)[:200]}") from error
        yield World(device, rank, size)


def _part() -> None:
    """Leave the other ranks. Comes after the last heartbeat: it may wait for what another one does."""
    if dist.is_initialized():
        dist.destroy_process_group()
