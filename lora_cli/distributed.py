"""Where this process runs: its device, and the other processes (ranks) of its run with what they tell each other.

Only tensors and JSON travel, no pickle. Ranks are replicas: each has the whole model and the same state.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import rendezvous

from lora_cli import heartbeat, launch
from lora_cli.errors import NOTHING_LOADED, InputError, SurroundingsError, shown

Item = TypeVar("Item")

_MEET = timedelta(minutes=10)
_ANSWER = timedelta(days=7)  # the main rank may prepare or write for long; heartbeats tell who is gone


@dataclass(frozen=True)
class World:
    """What this process runs on, and the ranks of its run. All of them have to make the same calls in the same order.

    Raises SurroundingsError where another rank ended; where one is halted, the process ends.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    in_step: bool = False  # each rank has a part of the base only, so that all have to run every forward

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
        """Iterate over (item, whether it counts): this rank's share of them.

        Ranks that go in step are given as many each. Who has nothing left gets the last one, which is not to count.
        """
        yield from ((item, True) for item in items[self.rank :: self.size])
        if self.in_step and 0 < len(items) % self.size <= self.rank:
            yield items[-1], False

    def any(self, said: bool) -> bool:
        """Return whether any rank says so, where ranks go in step; else only whether this one does."""
        return bool(self.largest(said)) if self.in_step else said

    def add_up(self, values: Tensor) -> Tensor:
        """Replace values by their sums over all ranks; the same bits on each."""
        self._reduce(values, dist.ReduceOp.SUM)
        return values

    def spread(self, values: Tensor) -> Tensor:
        """Replace values by those of the main rank."""
        if self.size > 1:
            with self._answered():
                dist.broadcast(values, 0)
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


def free_memory(device: torch.device, processes: int = 1) -> int | None:
    """Return the bytes that each process can still take on a device; None where nobody says, or it is not here.

    So many processes of this machine share a CPU's memory; GPUs they have each their own.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        most, taken = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - taken)
    return free // processes


def is_here(wanted: str) -> bool:
    """Return whether this machine has the device that `model.device` names."""
    return wanted != "cuda" or torch.cuda.is_available()


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Return the device of a process by `model.device`: auto is a GPU where torch sees one, else the CPU.

    Raises SurroundingsError where there is no GPU, or none for this process.
    """
    if not is_here(wanted):
        why = "it is a build for CPUs" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        said = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {shown(visible)!r}"
        raise SurroundingsError(
            f"model.device: cuda, but torch {torch.__version__} sees no GPU here ({why}{said}). Where nvidia-smi lists "
            "one, install torch for its CUDA version; else set model.device to auto or cpu.",
            state=NOTHING_LOADED,
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise SurroundingsError(
            f"This machine has fewer GPUs ({count}) than processes: --nproc-per-node must be at most {count}."
        )
    return torch.device("cuda", local_rank)


def current_world(wanted: str) -> World:
    """Return the world of a command that runs in one process, on the device that `model.device` names.

    Raises SurroundingsError when there is no such device.
    """
    return World(choose_device(wanted))


@contextlib.contextmanager
def joined(wanted: str, in_step: bool = False) -> Iterator[World]:
    """Meet the other ranks that torchrun started, and be one of them while the block runs; alone where it did not.

    Each is on a device of its own where `model.device` names GPUs. Raises SurroundingsError where the environment makes
    no sense, or has more ranks than there are devices.
    """
    started = launch.current()
    if started.size == 1:
        yield current_world(wanted)
        return
    launch.die_with(os.getppid())
    device, backend = choose_device(wanted, started.local_rank), "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as stack:
        stack.callback(_part)
        try:
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {started.size}"
            found, rank, size = next(rendezvous("env://", timeout=_MEET))
            store = dist.PrefixStore(attempt, found)  # torchrun keeps it, with the addresses of processes that ended
            stack.enter_context(heartbeat.beating(store.clone(), started))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_ANSWER)
        except (RuntimeError, ValueError) as error:
            raise SurroundingsError(f"The {started.size} processes could not meet: {str(error)[:200]}") from error
        yield World(device, rank, size, in_step)


def _part() -> None:
    """Leave the other ranks. Comes after the last heartbeat: it may wait for what another one does."""
    if dist.is_initialized():
        dist.destroy_process_group()
