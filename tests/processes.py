"""Forked processes: quick where torch is imported already; a signal, or a fault put into one, is its own."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_cli import cli, ending


def lora(*arguments: object) -> None:
    """Run the program in this process, as `python -m lora_cli` would."""
    sys.argv = ["lora", *map(str, arguments)]
    ending._OTHERS_SECONDS = 0.0  # nobody ends the others here
    cli.main()


def disturb(module: Any, name: str, call: int, fault: Callable[[Any], Any], for_good: bool = False) -> None:
    """Put a fault behind a function's `call`th call in this process, and behind all later ones where it is for good.

    `fault` gets what the function returns, and returns what is to be returned in its place, or None.
    """
    function, calls = getattr(module, name), 0

    def disturbed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*arguments, **named)
        return fault(result) or result if calls == call or (for_good and calls > call) else result

    setattr(module, name, disturbed)


def send(number: int) -> Callable[[Any], None]:
    """Return a fault that sends this process a signal."""
    return lambda _: os.kill(os.getpid(), number)


def fork(work: Callable[[], Any], said: Path, **environment: str) -> int:
    """Start a process that does some work and writes what it says into a file; return its number."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        torch.set_num_threads(1)
        os.environ.update(environment)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(process: int, seconds: float = 60.0) -> int:
    """Wait for a process; return its exit code, that of a signal negative. It is killed when it takes too long."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"process {process} did not end in {seconds} seconds")


def start_ranks(size: int, work: Callable[[int], Any], folder: Path) -> list[int]:
    """Start the processes of one run, each with its rank, as torchrun would; what they say is in folder/rank-N."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        fork(lambda rank=rank: work(rank), folder / f"rank-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(size)
    ]


def run_ranks(size: int, work: Callable[[int], Any], folder: Path) -> tuple[list[int], list[str]]:
    """Run the processes of one run; return their exit codes and what each said."""
    codes = [end(process) for process in start_ranks(size, work, folder)]
    return codes, [(folder / f"rank-{rank}").read_text() for rank in range(size)]
