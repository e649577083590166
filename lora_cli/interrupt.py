"""Ctrl-C, SIGTERM or a closed terminal as a request: the step is finished and saved; asked twice, all ends at once."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType


def heard() -> list[signal.Signals]:
    """Return the signals that ask to stop; one that who started us had ignored stays so (nohup and SIGHUP)."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """Whether somebody asked to stop. Before `saving` is set there is nothing to save and the process just ends."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.saving = False
        self.leave: Callable[[], None] = lambda: None  # what is to be done before the process ends at once

    @property
    def wanted(self) -> bool:
        return self.signal_number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted or not self.saving:
            # Not an exception: one raised in the middle of an import or of a file's rename could be swallowed there.
            # What is being written has a temporary name, and the kernel lets go of the run's lock.
            said = "stopped at once; the last checkpoint is whole." if self.wanted else "stopped while getting ready."
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
            self.leave()
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{cursor}\n{said} The same command goes on from there.\n".encode())
            os._exit(128 + number)
        self.signal_number = number


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Listen while the block runs."""
    request = StopRequest()
    before = {number: signal.signal(number, request._handle) for number in heard()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
