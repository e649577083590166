"""Where this process runs. One process, for now; what is said here is the only knowledge of devices and ranks."""

import os
from dataclasses import dataclass

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


def current_world() -> World:
    """Return the world this process was started in. Raises SurroundingsError when it has several processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise SurroundingsError(f"WORLD_SIZE is {size}: this version trains in one process. Start it without torchrun.")
    return World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
