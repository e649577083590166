"""Draws results and errors. Results go to stdout, messages to stderr; without a terminal, plain lines."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lora_cli import stand_ins
from lora_cli.errors import UserError, in_lines
from lora_cli.records import gigabytes
from lora_cli.redact import redact
from lora_cli.reports import ExportReport, GgufReport

for number, name in ((1, "stdout"), (2, "stderr")):
    if getattr(sys, name) is None:  # it was closed by who started us
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        setattr(sys, name, open(number, "w"))  # noqa: SIM115 - for as long as the process lives
    stand_ins.use(getattr(sys, name))


class _Messages:
    """stderr, and nothing any more once that is closed: what is going on goes on when nobody can read of it."""

    def write(self, text: str) -> int:
        """Write where somebody reads."""
        with self._open():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush where somebody reads."""
        with self._open():
            self._stream.flush()

    @property
    def rich_proxied_file(self) -> "_Messages":
        """This is what rich writes to, also while it has put a proxy for others in the place of stderr."""
        return self

    @property
    def _stream(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a pipe whose reader ended, a terminal that is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


out = Console(highlight=False, emoji=False)
if not out.is_terminal:
    out.width = 140  # lines of a file need not be folded as early as a terminal's
err = Console(file=cast(IO[str], _Messages()), stderr=True, highlight=False, emoji=False)


def is_live() -> bool:
    """Return whether what stderr shows can be drawn over: a terminal that knows how, not a coloured file."""
    return err.is_terminal and not err.is_dumb_terminal and sys.stderr.isatty()


def say(text: str | Text, console: Console | None = None, indent: int = 0) -> None:
    """Print a line, on stdout unless told otherwise; in a terminal folded between words, the next lines indented.

    What must stay whole to be copied, a path or a command, is never cut; what a text tells the terminal to do is shown.
    """
    console = console or out
    line = text if isinstance(text, Text) else Text(in_lines(text))
    if not console.is_terminal:
        console.print(line, soft_wrap=True)
        return
    for paragraph in line.split("\n", allow_blank=True) or [line]:
        for number, folded in enumerate(_fold(paragraph, console.width, indent)):
            console.print(Text(" " * indent if number else "") + folded, soft_wrap=True)


def _fold(line: Text, width: int, indent: int) -> Iterator[Text]:
    """Yield a line's parts between words, all but the first with room for an indent; a word is never cut."""
    begins, column = list[int](), 0
    for word in re.finditer(r"\s*\S+", line.plain):
        length = cell_len(word.group())
        if column and column + length > width:
            begins.append(word.end() - len(word.group().lstrip()))
            column, length = indent, cell_len(word.group().lstrip())
        column += length
    for part in line.divide(begins):
        part.rstrip()
        yield part


def show_next(*commands: tuple[Sequence[object], str]) -> None:
    """Show what can be typed now, each command with a few words."""
    lines = [(shlex.join(map(str, command)), words) for command, words in commands]
    widest = max(len(line) for line, _ in lines)
    beside = all(2 + widest + 3 + len(words) <= out.width for _, words in lines)
    say("")
    say(Text("Next:", "bold"))
    for line, words in lines:
        if beside:
            out.print(Text(f"  {line:{widest}}   ") + Text(words, "dim"), soft_wrap=True)
        else:
            out.print(Text(f"  {line}"), soft_wrap=True)
            say(Text(f"      {words}", "dim"), indent=6)


def is_interactive() -> bool:
    """Return whether somebody can be asked: both what is typed and what is shown belong to a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, in ASCII where that is all that it shows."""
    text = json.dumps(values, ensure_ascii=not stand_ins.is_utf8(sys.stdout))
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")  # half of a character cannot be written
    sys.stdout.flush()


def print_text(text: str) -> None:
    """Print plain text on stdout, as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def message(text: str, whole: bool = False) -> None:
    """Print a message on stderr; what is to be copied as a `whole` is not folded."""
    if whole:
        err.print(Text(redact(text)), soft_wrap=True)
    else:
        say(redact(text), err)


def print_error(error: UserError) -> None:
    """Print an error as one paragraph on stderr."""
    say(Text("error: ", style="bold red") + Text(error.paragraph()), err)


# --- export ---


def show_export(report: ExportReport | GgufReport) -> None:
    """Show what was written for another runtime, and what was compared."""
    for note in report.notes:
        message(f"note: {note}")
    line = f"Wrote {report.output} ({report.format})."
    if isinstance(report, GgufReport):
        rounding = f", rounded by at most {report.largest_error:.2g}" if report.largest_error else ", exact"
        line = (
            f"Wrote {report.output} ({report.format}, {report.kind}, {gigabytes(report.bytes)}). Read back and "
            f"compared: {report.tensors} tensors, {report.values:,} numbers{rounding}; {report.metadata} keys."
        )
    say(line)
