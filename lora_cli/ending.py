"""How a command ends: what goes wrong becomes an exit code and one paragraph on stderr."""

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lora_cli import arguments, console, interrupt, launch, storage
from lora_cli.errors import Interrupted, SurroundingsError, UserError, shown
from lora_cli.records import as_json
from lora_cli.redact import redact
from lora_cli.reports import ErrorReport, Problem

_OTHERS_SECONDS = 2.0  # in which torchrun ends the others after one of its processes failed


def run(command: Callable[[], None]) -> None:
    """Run a command; turn what goes wrong into an exit code and one paragraph on stderr."""
    again = shlex.join(["lora", *sys.argv[1:]])
    try:
        with interrupt.listening(again):
            launch.settle()
            arguments.require_no_secret(sys.argv[1:])
            command()
    except UserError as error:
        _end(error, again)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in storage.FAULTS:
            where = f"{error.filename}: " if error.filename else ""
            refused = f"{where}the machine refused: {error.strerror}."
            _end(SurroundingsError(refused, state="What was saved is whole."), again)
        _leave_it_to_the_main_process(error)
        log = _log(redact(traceback.format_exc()))
        bug = f"a bug in lora ({type(error).__name__}: {shown(error, 200)})."
        console.message(f"error: {bug}\n{log}")
        _exit(Problem(1, [bug], log))


def _leave_it_to_the_main_process(error: Exception) -> None:
    """Where this is another one: end, or wait to be ended by torchrun, if the main process fails too and says why."""
    if launch.is_main():
        return
    if isinstance(error, Interrupted):
        sys.exit(error.exit_code)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_OTHERS_SECONDS)


def _end(error: UserError, again: str) -> NoReturn:
    """Show an error and end with its exit code; `again` is the command that goes on."""
    _leave_it_to_the_main_process(error)
    console.print_error(error)
    if isinstance(error, Interrupted):
        console.message(f"Continue with: {again}", whole=True)
    _exit(Problem(error.exit_code, error.problems, error.state))


def _exit(problem: Problem) -> NoReturn:
    """End with a problem's exit code; say it on stdout too where the command was to print JSON there."""
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):
            console.print_json(as_json(ErrorReport(problem)))
    sys.exit(problem.exit_code)


def _log(text: str) -> str:
    """Write a traceback into a file and return where it is; where none can be written, return it as it is."""
    try:
        log = Path(tempfile.gettempdir()) / f"lora-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        storage.write_file(log, text)
    except (OSError, SurroundingsError):
        return f"{text}Please report it."
    return f"The traceback is in {log}; please report it."
