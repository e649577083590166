"""A terminal of a given size: commands run in a real pty, and what a user would then see of them."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07|(\r|\n|\x1b)|([^\x1b\r\n]+)")


@dataclass
class Screen:
    """A terminal's lines, scrollback included, from what is written to it; a line that is too long goes on below."""

    columns: int
    rows: int
    lines: list[list[str]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    cursor: bool = True
    frames: list[str] = field(default_factory=list)  # what stood there each time before something was erased

    def write(self, text: str) -> None:
        """Take in text with its control codes."""
        for code, letter, control, plain in _CODE.findall(text):
            if letter:
                self._obey(code, letter)
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self._down()
            for char in plain:
                self._put(char)

    def text(self) -> str:
        """Return all lines, without what is blank at their ends."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip()

    def _obey(self, code: str, letter: str) -> None:
        count = int(code) if code.isdigit() else 1
        match letter:
            case "m":
                pass
            case "h" | "l" if code == "?25":
                self.cursor = letter == "h"
            case "A":
                self.row = max(self.row - count, len(self.lines) - self.rows, 0)
            case "K" if code == "2":
                if self.lines[self.row] and self.row == len(self.lines) - 1:
                    self.frames.append(self.text())
                self.lines[self.row] = []
            case _:
                raise AssertionError(f"a code that no command of ours needs: {code}{letter}")

    def _put(self, char: str) -> None:
        if self.column == self.columns:
            self.column = 0
            self._down()
        line = self.lines[self.row]
        line.extend(" " * (self.column + 1 - len(line)))
        line[self.column] = char
        self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])


@dataclass(frozen=True)
class Seen:
    """A command that ended in a terminal: its exit code, all that it wrote, and the screen after it."""

    code: int
    raw: str
    screen: Screen

    @property
    def plain(self) -> str:
        """What was written, without codes."""
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", self.raw)


def watch(
    arguments: list[object],
    columns: int,
    rows: int = 40,
    environment: Mapping[str, str] | None = None,
    react: Callable[[str, int, int], None] = lambda text, child, terminal: None,
) -> Seen:
    """Run `lora` in a terminal; `react` is told of everything written so far, the process and the terminal."""
    unset = dict.fromkeys(("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"))
    settings = {**os.environ, **unset, "TERM": "xterm-256color", "PYTHONPATH": str(_ROOT), **(environment or {})}
    child, terminal = pty.fork()
    if not child:
        try:
            resize(2, columns, rows)
            program = [sys.executable, "-m", "lora_cli", *map(str, arguments)]
            os.execve(sys.executable, program, {name: value for name, value in settings.items() if value is not None})
        finally:
            os._exit(127)
    written = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # nobody has it open any more
            break
        written += piece
        react(written.decode("utf-8", "replace"), child, terminal)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    screen = Screen(columns, rows)
    screen.write(written.decode("utf-8"))
    return Seen(os.waitstatus_to_exitcode(status), written.decode("utf-8"), screen)


def resize(terminal: int, columns: int, rows: int) -> None:
    """Give a terminal another size."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
