"""Where this process runs. One process, for now; what is said here is the only knowledge of devices and ranks."""

import os
from dataclasses import dataclass

import torch

from lora_cli.errors import SurroundingsError


@dataclass(frozen=True)
class World:
    """What this process runs on."""

    device: torch.device


def current_world() -> World:
    """Return the world this process was started in. Raises SurroundingsError when it has several processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise SurroundingsError(f"WORLD_SIZE is {size}: this version trains in one process. Start it without torchrun.")
    return World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
