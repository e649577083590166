"""What is typed: one line, or several that belong together; edited with readline, where there is one."""

import sys
from types import ModuleType
from typing import Any

from lora_cli import interrupt

FENCE = '"""'  # opens and closes a text of several lines
_MORE = "... "


class Lines:
    """Reads what is typed at a terminal. Earlier lines are remembered while it lives, in no file."""

    def __init__(self) -> None:
        self._editor = _line_editor()
        self._terminal = _terminal()

    def read(self, prompt: str) -> str | None:
        """Return the next text; None when the user leaves, by Ctrl-D, or by Ctrl-C where nothing is typed yet.

        Ctrl-C anywhere else drops what is typed. A line that ends in a backslash goes on, and so does a text between
        two FENCEs.
        """
        with interrupt.leaving(self._restore):
            while True:
                typed: list[str] = []
                try:
                    return self._text(prompt, typed)
                except EOFError:
                    sys.stdout.write("\n")
                    return None
                except KeyboardInterrupt:
                    sys.stdout.write("\n")
                    if not typed and not (self._editor and self._editor.get_line_buffer()):
                        raise

    def _text(self, prompt: str, typed: list[str]) -> str:
        """Read lines into `typed` until the text is whole, and return it."""
        line = self._line(prompt)
        fenced = line.lstrip().startswith(FENCE)
        line = line.lstrip().removeprefix(FENCE) if fenced else line
        while True:
            if fenced and line.rstrip().endswith(FENCE):
                return "\n".join([*typed, line.rstrip().removesuffix(FENCE)]).strip("\n")
            if not fenced and not line.endswith("\\"):
                return "\n".join([*typed, line])
            typed.append(line if fenced else line[:-1])
            line = self._line(_MORE)

    def _line(self, prompt: str) -> str:
        if not sys.stdout.isatty():  # what is kept in a file is the answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        with interrupt.raised():
            return input(prompt)

    def _restore(self) -> None:
        """Give the terminal back as it was: a signal may end the process while a line is edited."""
        if self._terminal is not None:
            module, settings = self._terminal
            module.tcsetattr(0, module.TCSANOW, settings)


def _line_editor() -> ModuleType | None:
    """Return readline, whose import alone has input() edit its lines."""
    try:
        import readline
    except ImportError:  # Windows has none
        return None
    return readline


def _terminal() -> tuple[Any, Any] | None:
    """Return the module that knows terminals, and how this one is set; None where there is none."""
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios, termios.tcgetattr(0)
    except (termios.error, OSError):
        return None
