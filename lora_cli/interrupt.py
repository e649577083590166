"""Ctrl-C and SIGTERM as a request: the loop finishes its step and saves; asked twice, the process ends at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from lora_cli.errors import Interrupted


class StopRequest:
    """Whether somebody asked to stop. Before `saving` is set there is nothing to save and the answer is immediate."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.saving = False

    @property
    def wanted(self) -> bool:
        return self.signal_number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number
        if not self.saving:
            raise Interrupted(
                number, "stopped on request.", state="No step had been taken; the same command starts anew."
            )


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Listen for SIGINT and SIGTERM while the block runs."""
    request = StopRequest()
    before = {number: signal.signal(number, request._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
