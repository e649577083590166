"""Where this process runs. One process, for now; what is said here is the only knowledge of devices and ranks."""

import contextlib
import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.errors import SurroundingsError


@dataclass(frozen=True)
class World:
    """What this process runs on."""

    device: torch.device


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
    """Return the world this process was started in. Raises SurroundingsError when it has several processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise SurroundingsError(f"WORLD_SIZE is {size}: this version trains in one process. Start it without torchrun.")
    return World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
