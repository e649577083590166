"""Limits for what runs chat templates: of time, of memory, and a process that can be stopped.

A template is a program that comes with a model. Jinja's sandbox keeps it from reaching the machine, not from looping
or from asking for memory. A handler ends what loops in Python; one long operation in C (a `translate` of 300 million
characters) lets no handler run, so templates are rendered in processes that the kernel ends by a timer of CPU time.
"""

import contextlib
import mmap
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from lora_cli import parallel
from lora_cli.errors import NOTHING_LOADED, ModelError

Result = TypeVar("Result")

ANOTHER = "data.chat_template can name another"  # the way out
SECONDS = 2.0  # of CPU time that one rendering may take
BLOCK_SECONDS = 20.0  # the same of all renderings of a block of rows, and
SECONDS_MORE = 0.05  # for each of them: what is many times slower than any known template is not waited for
MEMORY = 1 << 30  # bytes a block of rows may add to the process while it renders

_row = mmap.mmap(-1, 8)  # the number of the row that is being rendered; shared with the processes that render
_block_ends = float("inf")  # by this process's CPU time


class TemplateLimit(ModelError):
    """A chat template goes beyond a limit; no other row is tried."""

    def __init__(self, what: str) -> None:
        super().__init__(what, state=NOTHING_LOADED)


class _Overdue(BaseException):
    """Raised inside a template; not an Exception, since Jinja catches those where it folds constants."""


def begin_row(number: int) -> None:
    """Note the row that is worked on from now on; the process that waits for this one sees it too."""
    _row[:] = number.to_bytes(8, "little")
    begin_rendering()


def begin_rendering() -> None:
    """Start the clock anew: from now to the next rendering may take SECONDS, what is made of the text included."""
    global _block_ends
    _block_ends += SECONDS_MORE
    if threading.current_thread() is threading.main_thread():
        seconds = max(1e-3, min(SECONDS, _block_ends - time.process_time()))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        if parallel.in_worker():  # its signal has no handler: the kernel ends the process
            signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 0.1)


def row_at_work() -> int:
    """Return the number of the row whose rendering was begun last."""
    return int.from_bytes(_row[:], "little")


def apart(function: Callable[[], Result]) -> Result:
    """Return `function()`, called in a process of its own. Raises TemplateLimit where the kernel had to end it."""
    try:
        return parallel.run_apart(function)
    except parallel.Overdue:
        raise too_long() from None


def too_long() -> TemplateLimit:
    """Return the error of a template that renders for too long."""
    return TemplateLimit(f"The chat template takes more than {SECONDS:.0f} seconds to render this; {ANOTHER}.")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Run a block in which templates are rendered: each within SECONDS, all of them within MEMORY more bytes.

    Time is limited in the main thread of a process, memory where the system counts it (Linux). Raises TemplateLimit.
    """
    global _block_ends
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_main = threading.current_thread() is threading.main_thread()
    used = _address_space()
    before = signal.signal(signal.SIGVTALRM, _stop) if in_main else None
    if used is not None and (soft == resource.RLIM_INFINITY or used + MEMORY < soft):
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    _block_ends = time.process_time() + BLOCK_SECONDS
    try:
        yield
    except _Overdue:
        raise too_long() from None
    except MemoryError:
        raise TemplateLimit(
            f"The chat template takes more than {MEMORY >> 20} MiB of memory to render this; {ANOTHER}."
        ) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGVTALRM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Overdue


def _address_space() -> int | None:
    """Return the bytes of address space of this process; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None
