"""How this process was started: alone, or by torchrun as one of several. Knows nothing of torch."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

from lora_cli.errors import InputError, SurroundingsError

_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun tells each process
_THEIRS = ("MASTER_ADDR", "MASTER_PORT")  # where they meet; other tools set it too
_ON_THIS_MACHINE = "LOCAL_WORLD_SIZE"
_NOT_STARTED = {"RANK": None, "WORLD_SIZE": "1", "LOCAL_RANK": None}  # as some containers have it
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is; `local_rank` counts on this machine, and chooses the device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # the processes on this machine, which share its memory

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def current() -> Launch:
    """Read the environment. Raises SurroundingsError where it is half set, or says what cannot be."""
    given = {name: os.environ[name] for name in (*_OURS, *_THEIRS) if name in os.environ}
    if not given.keys() & set(_OURS) or {name: given.get(name) for name in _OURS} == _NOT_STARTED:
        return Launch()
    if missing := [name for name in (*_OURS, *_THEIRS) if name not in given]:
        raise SurroundingsError(
            f"The environment has {', '.join(given)} but not {', '.join(missing)}: it is half that of torchrun. Start "
            "with `torchrun --nproc-per-node N -m lora_cli train CONFIG`, or unset these.",
        )
    if wrong := [f"{name}={given[name][:40]}" for name in _OURS if not given[name].isdecimal()]:
        raise SurroundingsError(f"The environment has {', '.join(wrong)}, which must be whole numbers.")
    rank, size, local_rank = (int(given[name]) for name in _OURS)
    if not local_rank <= rank < size:
        raise SurroundingsError(
            f"The environment has RANK={rank}, WORLD_SIZE={size} and LOCAL_RANK={local_rank}: ranks are counted from "
            "0, and a local one is not above the other."
        )
    here = os.environ.get(_ON_THIS_MACHINE, "")
    return Launch(rank, size, local_rank, int(here) if here.isdecimal() and int(here) else size)


def is_to_start(processes: int, restarts: int = 0) -> bool:
    """Return whether this process is to start so many others; it may be one of them already. Raises InputError."""
    here = current().size
    if processes == 1 and restarts:
        raise InputError("--restarts: starts the processes of --nproc again, and there is no --nproc above 1.")
    if here > 1 and processes not in (1, here):
        raise InputError(
            f"--nproc {processes}: this is one of {here} processes already (WORLD_SIZE), started by torchrun; leave "
            "--nproc out."
        )
    return here == 1 < processes


def require_alone(why: str) -> None:
    """Raise SurroundingsError where this is one of several processes; `why` says why one does the command's work."""
    if (size := current().size) > 1:
        raise SurroundingsError(f"This is one of {size} processes (WORLD_SIZE), and {why}. Start it without torchrun.")


def settle() -> None:
    """Where torchrun started this process: end with it, and have torch, not yet imported, show no C++ stacks.

    What they tell when another process is gone is said in a sentence.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        die_with(os.getppid())


def is_main() -> bool:
    """Return whether this process writes and prints, whatever else its environment says."""
    return os.environ.get("RANK", "0") in ("", "0")


def die_with(parent: int) -> None:
    """Have the system end this process when its parent ends, however that ends; elsewhere than on Linux it goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this line
            os._exit(1)
