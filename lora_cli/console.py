"""Draws results and errors. Results go to stdout, messages to stderr; without a terminal, plain lines."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_cli.errors import UserError
from lora_cli.records import DataCounts, Finished, with_interval
from lora_cli.redact import redact
from lora_cli.reports import (
    CheckReport,
    ExportReport,
    GgufReport,
    Marked,
    RuntimeReport,
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
_SHOWN_CHARACTERS = 2000  # of a row in a preview


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


# --- training ---


def duration(seconds: float) -> str:
    """Return seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_finished(event: Finished, run: str, already: bool) -> None:
    """Show how a run ended and what to type next."""
    head = f"This run is already finished ({event.reason}, {event.step} steps)" if already else f"Done: {event.reason}"
    lines = [f"{head}."]
    if event.best_loss is not None and event.base_loss is not None:
        gain = f"{event.base_loss:.4f} (base) -> {event.best_loss:.4f}"
        lines.append(f"Validation loss {gain} (step {event.best_step}, the best, kept).")
        if event.best_loss >= event.base_loss:
            lines.append(
                "No evaluation was better than the base model: this adapter does not help on the validation data."
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
    lines.append(f"Adapter: {event.adapter}")
    lines.append(f"Next: lora eval {run}   or   lora merge {run} --output {run.rstrip('/')}-merged")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


# --- check ---


def show_check(report: CheckReport, whole: bool) -> None:
    """Show what a run would do; rows are cut in the middle where they are long, unless `whole`."""
    sets = {"train": report.train, "validation": report.validation, "test": report.test, "replay": report.replay}
    present = {name: counts for name, counts in sets.items() if counts is not None}
    out.print(_data_table(present))
    lines = [f"lengths: {_bars(report.train)}", *(line for n, c in present.items() for line in _source_lines(n, c))]
    if report.overlap is not None:
        shared, of = report.overlap.prompts, report.overlap.of
        lines.append(f"overlap: {shared} of {of} validation rows have a prompt that is trained on")
    lines.append(
        f"steps: {report.steps_per_epoch:,} an epoch of {report.examples_per_epoch:,} examples, "
        f"{report.total_steps:,} in all, about {duration(report.seconds)} here"
    )
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
    adapted = ", ".join(f"{name} x{count}" for name, count in report.modules.items())
    share = report.trainable_parameters / report.total_parameters
    out.print(f"adapted: {adapted}", markup=False, soft_wrap=True)
    out.print(
        f"trained: {report.trainable_parameters:,} of {report.total_parameters:,} parameters ({share:.2%})",
        markup=False,
    )
    memory = report.memory
    parts = f"base {_gb(memory.base)}, adapter {_gb(memory.adapter)}, activations {_gb(memory.activations)}"
    parts += f"; {memory.tokens} tokens a forward"
    out.print(f"memory: about {_gb(memory.total)} ({parts})", markup=False)
    for line in _runtime_lines(report.runtimes):
        out.print(line, markup=False, soft_wrap=True)
    for notice in report.notices:
        out.print(f"note: {notice}", markup=False, soft_wrap=True)
    for shown in report.previews:
        out.print(f"\n{shown.row}, the trained part marked:", markup=False, soft_wrap=True)
        out.print(_marked(shown.pieces, None if whole else _SHOWN_CHARACTERS), soft_wrap=True)


def _data_table(sets: Mapping[str, DataCounts]) -> Table:
    table = Table("", *sets, box=None)
    figures: dict[str, Callable[[DataCounts], str]] = {
        "rows": lambda c: f"{c.rows:,}",
        "examples": lambda c: f"{c.examples:,}",
        "tokens": lambda c: f"{c.tokens:,}",
        "trained tokens": lambda c: f"{c.targets:,} ({c.targets / c.tokens:.0%})",
        "length at 50 %": lambda c: f"{c.length_percentiles[0]:,}",
        "  90 / 99 / 100 %": lambda c: " / ".join(f"{p:,}" for p in c.length_percentiles[1:]),
        "trained at 50 %": lambda c: f"{c.target_percentiles[0]:,}",
        " 90 / 99 / 100 %": lambda c: " / ".join(f"{p:,}" for p in c.target_percentiles[1:]),
        "dropped / cut": lambda c: f"{c.dropped:,} / {c.truncated:,}",
        "duplicates": lambda c: f"{c.duplicates:,}",
    }
    for name, figure in figures.items():
        table.add_row(name, *map(figure, sets.values()))
    return table


def _source_lines(name: str, counts: DataCounts) -> Iterator[str]:
    for source in counts.sources:
        form = f" ({source.format})" if source.format else ""
        unread = f"; columns not read: {', '.join(source.unread)}" if source.unread else ""
        yield f"{name}: {source.name}{form}: {source.rows:,} rows, {source.examples:,} examples{unread}"
    if counts.too_long:
        more = " ..." if counts.dropped + counts.truncated > len(counts.too_long) else ""
        yield (
            f"{name}: {counts.dropped:,} sequences dropped, {counts.truncated:,} cut, {counts.lost_targets:,} answer "
            f"tokens lost: {' '.join(counts.too_long)}{more}"
        )


def _runtime_lines(runtimes: Sequence[RuntimeReport]) -> Iterator[str]:
    """Say where the adapter will load, one line a runtime."""
    words = {True: "yes", False: "no", None: "not known"}
    yield "where the adapter will load (merged, it does wherever its base does):"
    for each in runtimes:
        yield f"  {each.name:<10} {words[each.loads]}: {each.note}"


def _bars(counts: DataCounts) -> str:
    """Return a histogram of lengths as one line."""
    most = max(counts.length_histogram)
    marks = " ▁▂▃▄▅▆▇█"
    bars = "".join(marks[-(-count * (len(marks) - 1) // most)] for count in counts.length_histogram)
    return f"0 |{bars}| {counts.length_percentiles[-1]:,} tokens"


def _marked(pieces: Sequence[Marked], most: int | None) -> Text:
    """Return a row's text with the trained part marked; of a long one the first three quarters and the end."""
    text = Text()
    length = sum(len(piece.text) for piece in pieces)
    cut = (0, 0) if most is None or length <= most else (most * 3 // 4, length - most // 4)
    begin = 0
    for piece in pieces:
        end = begin + len(piece.text)
        shown = piece.text
        if begin < cut[1] and end > cut[0]:
            head, tail = shown[: max(0, cut[0] - begin)], shown[max(0, cut[1] - begin) :]
            gap = f"\n... {cut[1] - cut[0]:,} characters ...\n" if begin <= cut[0] < end else ""
            shown = head + gap + tail
        begin = end
        if shown:
            marked = shown if out.is_terminal or not piece.trained else f"[[{shown}]]"
            text.append(marked, style="bold green" if piece.trained else "dim")
    return text


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# --- export ---


def show_export(report: ExportReport | GgufReport) -> None:
    """Show what was written for another runtime, and what was compared."""
    for note in report.notes:
        message(f"note: {note}")
    line = f"Wrote {report.output} ({report.format})."
    if isinstance(report, GgufReport):
        rounding = f", rounded by at most {report.largest_error:.2g}" if report.largest_error else ", exact"
        line = (
            f"Wrote {report.output} ({report.format}, {report.kind}, {_gb(report.bytes)}). Read back and compared: "
            f"{report.tensors} tensors, {report.values:,} numbers{rounding}; {report.metadata} keys."
        )
    out.print(line, markup=False, soft_wrap=True)
