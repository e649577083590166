"""Ctrl-C, SIGTERM and SIGHUP as a request: what can last asks for it, and ends by itself; asked twice, at once.

A handler that raised instead could be swallowed in the middle of an import or of a file's rename.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from lora_cli import launch
from lora_cli.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if sys.platform != "win32" else ()))


class StopRequest:
    """Whether somebody asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def ask(self, number: int = signal.SIGTERM) -> None:
        """Ask, as that signal would."""
        self.signal_number = number

    @property
    def wanted(self) -> bool:
        """Whether somebody asked."""
        return self.signal_number is not None


_request = StopRequest()
_patient = 0  # blocks under way that end by themselves
_command = ""
_leaving: list[Callable[[], None]] = []  # what is to be done before a signal ends the process


def requested() -> StopRequest:
    """Return this process's request: signals are sent to a process, so there is one."""
    return _request


@contextlib.contextmanager
def leaving(function: Callable[[], None]) -> Iterator[None]:
    """While the block runs, have a function called before a signal ends the process at once."""
    _leaving.append(function)
    try:
        yield
    finally:
        _leaving.remove(function)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """While the block runs a signal only leaves a request; it asks for it, or ends soon, and cleans up behind itself.

    Elsewhere there is nothing to save or to clean, and a signal ends the process.
    """
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1


def taken() -> bool:
    """Return whether Ctrl-C was pressed, and forget it: what it was to stop has stopped."""
    pressed = _request.signal_number == signal.SIGINT
    if pressed:
        _request.signal_number = None
    return pressed


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """While the block runs, which does nothing but wait for a line, Ctrl-C raises KeyboardInterrupt in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def poll() -> None:
    """Raise Interrupted where somebody asked to stop."""
    if _request.signal_number is not None:
        raise Interrupted(_request.signal_number, "stopped on request.")


def _handle(number: int, frame: FrameType | None) -> None:
    handed_on = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, whose processes may have heard it already
    if not _patient or (_request.wanted and not handed_on):
        said = "stopped at once; what is whole stays whole." if _request.wanted else "stopped; nothing was written."
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        for function in reversed(_leaving):
            function()
        if launch.is_main():
            with contextlib.suppress(OSError):
                os.write(2, f"{cursor}\n{said} Continue with: {_command}\n".encode())
        os._exit(128 + number)
    _request.signal_number = number


@contextlib.contextmanager
def listening(command: str) -> Iterator[None]:
    """Take signals as requests while the block runs; `command` is what to type to go on.

    A signal that is ignored already, as SIGHUP under nohup is, stays so.
    """
    global _request, _command
    _request, _command = StopRequest(), command
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in heard}
    try:
        yield
    finally:
        _request = StopRequest()
        for number, handler in before.items():
            signal.signal(number, handler)
