"""A reader on hostile input, watched: it returns or raises UserError, soon, and leaves the machine as it was."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lora_cli.errors import UserError
from torture.mutations import LONG

SECONDS = 2.0  # on the processor; a busy machine takes none of them
WAITING = 20.0  # by the clock
MEMORY = 1 << 30  # bytes of address space that reading may add
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("subprocess", "os.fork", "os.exec", "os.posix_spawn", "os.system", "socket", "os.mkdir", "os.rename",
              "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil", "pickle", "import",
              "ctypes.dlopen", "exec")  # fmt: skip
_CONTROL = {chr(number) for number in (*range(32), 127)} - {"\n"}


class TooLong(BaseException):
    """No reader may catch it."""


class Watch:
    """Sees what readers do in this process, from its making on; there is no way to end it but the process."""

    def __init__(self, waiting: float = WAITING) -> None:
        self._waiting = waiting
        self._on = False
        self._seen: list[str] = []
        sys.addaudithook(self._see)
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, self._alarm)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if writes or event.startswith(_FORBIDDEN):
            self._seen.append(f"{event} {str(arguments)[:80]}")

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        raise TooLong

    def failure(self, read: Callable[[], object]) -> tuple[bool, tuple[str, str] | None]:
        """Return whether the input was refused, and what is wrong with how it was read: its kind and an example."""
        refused, wrong = False, None
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, self._waiting)
        self._seen.clear()
        self._on = True
        try:
            read()
        except UserError as error:
            refused, wrong = True, _wrong_with(error)
        except TooLong:
            wrong = f"takes more than {SECONDS:.0f} seconds", ""
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}" if trace else ""
            wrong = f"raises {type(error).__name__} at {where}", str(error)[:100]
        finally:
            self._on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return refused, wrong or ((f"does {self._seen[0]}", "") if self._seen else None)


def _wrong_with(error: UserError) -> tuple[str, str] | None:
    """Return what is wrong with a message: nothing said, too much of a value shown, or something unprintable."""
    shown = error.paragraph()
    if not error.problems or not error.state or not all(problem.strip() for problem in error.problems):
        return "is refused without a word", shown
    if LONG[:81] in shown:
        return "shows more than 80 characters of a value", _around(shown, LONG[:81])
    if found := _CONTROL & set(shown):
        return "shows a control character", repr(_around(shown, min(found)))
    return None


def _around(text: str, part: str) -> str:
    at = text.index(part)
    return text[max(0, at - 100) : at + 20]
