"""Draws results and errors. Results go to stdout, messages to stderr; without a terminal, plain lines."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from lora_cli.errors import UserError
from lora_cli.records import Finished, with_interval
from lora_cli.redact import redact
from lora_cli.reports import (
    ExportReport,
    GgufReport,
)

for number, name in ((1, "stdout"), (2, "stderr")):
    if getattr(sys, name) is None:  # it was closed by who started us
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        setattr(sys, name, open(number, "w"))  # noqa: SIM115 - for as long as the process lives


class _Messages:
    """stderr, and nothing any more once that is closed: what is going on goes on when nobody can read of it."""

    def write(self, text: str) -> int:
        """Write where somebody reads."""
        with self._open():
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush where somebody reads."""
        with self._open():
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a pipe whose reader ended, a terminal that is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


_WIDTH = None if sys.stdout.isatty() else 140  # lines of a file need not be folded as early as a terminal's
out = Console(highlight=False, emoji=False, width=_WIDTH)
err = Console(file=cast(IO[str], _Messages()), stderr=True, highlight=False, emoji=False)


def is_interactive() -> bool:
    """Return whether somebody can be asked: both what is typed and what is shown belong to a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    text = json.dumps(values, ensure_ascii=False)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")  # half of a character cannot be written
    sys.stdout.flush()


def print_text(text: str) -> None:
    """Print plain text on stdout, as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def message(text: str) -> None:
    """Print a message on stderr."""
    err.print(redact(text), markup=False, soft_wrap=True)


def print_error(error: UserError) -> None:
    """Print an error as one paragraph on stderr."""
    err.print(Text("error: ", style="bold red") + Text(error.paragraph()), soft_wrap=True)


def gigabytes(count: int) -> str:
    """Return bytes as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# --- training ---


def duration(seconds: float) -> str:
    """Return seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_finished(event: Finished, run: str, already: bool) -> None:
    """Show how a run ended and what to type next."""
    head = f"This run is already finished ({event.reason}, {event.step} steps)" if already else f"Done: {event.reason}"
    lines, what = [f"{head}."], "model" if event.adapter.name == "model" else "adapter"
    if event.best_loss is not None and event.base_loss is not None:
        gain = f"{event.base_loss:.4f} (base) -> {event.best_loss:.4f}"
        lines.append(f"Validation loss {gain} (step {event.best_step}, the best, kept).")
        if event.best_loss >= event.base_loss:
            lines.append(
                f"No evaluation was better than the base model: this {what} does not help on the validation data."
            )
    if event.best_forgetting is not None:
        lines.append(f"Forgetting: the loss on general text rose by {event.best_forgetting:+.4f} nats a token.")
        if event.within_budget is False:
            lines.append(
                "No evaluation was within eval.forgetting_budget; the one that forgot least is kept. A lower "
                "train.learning_rate, data.replay and train.kl_to_base hold forgetting down; so does `lora scale`."
            )
    if event.test is not None:
        test, flattery = event.test, event.test.flattery
        lines.append(
            f"Test loss {test.base_loss:.4f} (base) -> {test.loss:.4f} ({test.targets:,} targets that chose nothing)"
            + (
                f"; validation was flattered by {with_interval(flattery, '+.4f')}."
                if flattery.value is not None
                else "."
            )
        )
    merging = f"   or   lora merge {run} --output {run.rstrip('/')}-merged" if what == "adapter" else ""
    lines += [f"{what.capitalize()}: {event.adapter}", f"Next: lora eval {run}{merging}"]
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


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
    out.print(line, markup=False, soft_wrap=True)
