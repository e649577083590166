"""The only file that draws. Results go to stdout, progress and messages to stderr; without a terminal, plain lines."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from lora_cli.errors import UserError
from lora_cli.records import (
    CheckReport,
    DataCounts,
    EvalReport,
    Evaluated,
    Event,
    Finished,
    Marked,
    MergeReport,
    Notice,
    Preparing,
    Saved,
    Score,
    Started,
    StepDone,
)

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)
Result = TypeVar("Result")
_SHOWN_CHARACTERS = 2000  # of a row in a preview
_QUIET_SECONDS = 5.0  # without a terminal, steps are reported no more often than this


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")


def print_text(text: str) -> None:
    """Print plain text on stdout, as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def message(text: str) -> None:
    """Print a message on stderr."""
    err.print(text, markup=False, soft_wrap=True)


def print_error(error: UserError) -> None:
    """Print an error as one paragraph on stderr."""
    err.print(Text("error: ", style="bold red") + Text(error.paragraph()), soft_wrap=True)


# --- training ---


class Follower:
    """Draws the events of a run as they come."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._seconds: list[float] = []
        self._validation = ""
        self._last_line = 0.0

    def follow(self, events: Iterable[Event]) -> Event | None:
        """Draw every event; return the last."""
        last: Event | None = None
        with self._progress:
            for last in events:
                self._draw(last)
        return last

    def _draw(self, event: Event) -> None:
        match event:
            case Preparing():
                self._preparing(event)
            case Notice():
                self._say(event.text)
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case Saved():
                if event.is_best:
                    self._say(f"saved {event.path} (best so far)")
            case Finished():
                pass

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def _preparing(self, event: Preparing) -> None:
        now = time.monotonic()
        if now - self._last_line > _QUIET_SECONDS:
            self._last_line = now
            left = event.seconds * (1 - event.done) / event.done if event.done else 0.0
            self._say(f"{event.source}: {event.rows:,} rows, {event.done:.0%}, {_duration(left)} left")

    def _start(self, event: Started) -> None:
        share = event.trainable_parameters / event.total_parameters
        held_out = event.validation.examples if event.validation else 0
        self._say(
            f"{event.train.examples} examples ({event.train.targets:,} of {event.train.tokens:,} tokens trained), "
            f"{held_out} held out; {event.trainable_parameters:,} parameters trained ({share:.2%}); {event.forward}."
        )
        self._total = event.total_steps
        self._task = self._progress.add_task("", total=event.total_steps, completed=event.step, facts="")

    def _step(self, event: StepDone) -> None:
        self._seconds = [*self._seconds[-19:], event.seconds]
        left = (self._total - event.step) * sum(self._seconds) / len(self._seconds)
        speed = f"{event.tokens / event.seconds:,.0f} tok/s"
        facts = f"loss {event.loss:.4f}{self._validation}  {speed}  {_duration(left)} left"
        if self._task is not None:
            self._progress.update(self._task, completed=event.step, facts=facts)
        now = time.monotonic()
        if not err.is_terminal and (now - self._last_line > _QUIET_SECONDS or event.step in (1, self._total)):
            self._last_line = now
            self._say(
                f"step {event.step}/{self._total}  epoch {event.epoch:.2f}  {facts}  lr {event.learning_rate:.2e}"
            )

    def _evaluated(self, event: Evaluated) -> None:
        self._validation = f"  val {event.loss:.4f}"
        what = "base model" if event.step == 0 else f"step {event.step}"
        note = ", best so far" if event.improved else ""
        left = f", patience {event.patience_left}" if event.patience_left is not None and event.step else ""
        self._say(
            f"{what}: validation loss {event.loss:.4f}, token accuracy {event.token_accuracy:.1%} "
            f"({event.targets:,} targets){note}{left}"
        )


def _duration(seconds: float) -> str:
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
    lines.append(f"Adapter: {event.adapter}")
    lines.append(f"Next: lora eval {run}   or   lora merge {run} --output {run.rstrip('/')}-merged")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


# --- check ---


def follow_preparation(news: Generator[Notice | Preparing, None, Result]) -> Result:
    """Draw the news of something that gets ready; return its result. Notices are part of the result's own."""
    follower = Follower()
    while True:
        try:
            follower._draw(next(news))
        except StopIteration as end:
            result: Result = end.value
            return result


def show_check(report: CheckReport, whole: bool) -> None:
    """Show what a run would do; rows are cut in the middle where they are long, unless `whole`."""
    sets = {"train": report.train, "validation": report.validation, "replay": report.replay}
    sets = {"train": report.train, "validation": report.validation, "replay": report.replay}
    present = {name: counts for name, counts in sets.items() if counts is not None}
    out.print(_data_table(present))
    lines = [f"lengths: {_bars(report.train)}", *(line for n, c in present.items() for line in _source_lines(n, c))]
    if report.overlap is not None:
        shared, of = report.overlap.prompts, report.overlap.of
        lines.append(f"overlap: {shared} of {of} validation rows have a prompt that is trained on")
    lines.append(
        f"steps: {report.steps_per_epoch:,} an epoch of {report.examples_per_epoch:,} examples, "
        f"{report.total_steps:,} in all, about {_duration(report.seconds)} here"
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
    out.print(f"memory: about {_gb(memory.total)} ({parts})", markup=False)
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
        yield f"{name}: {source.name}{form}: {source.rows:,} rows, {source.examples:,} examples"
    if counts.too_long:
        more = " ..." if counts.dropped + counts.truncated > len(counts.too_long) else ""
        yield (
            f"{name}: {counts.dropped:,} sequences dropped, {counts.truncated:,} cut, {counts.lost_targets:,} answer "
            f"tokens lost: {' '.join(counts.too_long)}{more}"
        )


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


# --- eval and merge ---


def show_eval(report: EvalReport) -> None:
    """Show base and adapter side by side, and three rows of what they said."""
    out.print(f"{report.data}: {report.rows} rows", markup=False)
    table = Table("", "base", "adapter", "n", box=None)
    rows: tuple[tuple[str, str, str], ...] = (
        ("loss", "loss", ".4f"),
        ("perplexity", "perplexity", ",.2f"),
        ("token accuracy", "token_accuracy", ".1%"),
        ("exact match", "exact_match", ".1%"),
    )
    for name, field, spec in rows:
        answers = field == "exact_match"
        n = f"{report.tuned.answers:,} answers" if answers else f"{report.tuned.targets:,} targets"
        table.add_row(name, _figure(report.base, field, spec), _figure(report.tuned, field, spec), n)
    out.print(table)
    for sample in report.samples[:3]:
        out.print(f"\n[bold]{escape(sample.row)}[/bold]")
        for name, text in (("expected", sample.expected), ("base", sample.base), ("adapter", sample.tuned)):
            out.print(f"  {name:9}{text[:300]}", markup=False, soft_wrap=True)


def _figure(score: Score, field: str, spec: str) -> str:
    value = getattr(score, field)
    return "-" if value is None else format(value, spec)


def show_merge(report: MergeReport) -> None:
    """Show what was merged and how it compares."""
    lines = (
        f"Merged {report.adapted_tensors} tensors ({report.dtype}) into {report.output}.",
        f"Reloaded and compared with base + adapter at {report.positions:,} positions: largest logit difference "
        f"{report.largest_logit_difference:.2g} (allowed {report.bound:.2g}), KL {report.mean_kl:.2g}, "
        f"same first choice {report.top1_agreement:.2%}.",
    )
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
