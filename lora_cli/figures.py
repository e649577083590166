"""Draws what a run would do, and comparisons of base and adapter: intervals, forgetting, the curve of a scan."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from lora_cli.console import duration, gigabytes, out
from lora_cli.records import DataCounts, Forgetting, with_interval
from lora_cli.reports import (
    CheckReport,
    EvalReport,
    Marked,
    MemoryEstimate,
    RuntimeReport,
    ScaleReport,
    ScanPoint,
    ScanReport,
)

_PERCENT = ("token_accuracy", "exact_match", "label_accuracy", "json_valid", "json_fields", "rouge_l", "bleu", "chrf")
_SHOWN_CHARACTERS = 2000  # of a row in a preview


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
    taken = "the time is not known" if report.seconds is None else f"about {duration(report.seconds)} here"
    lines.append(
        f"steps: {report.steps_per_epoch:,} an epoch of {report.examples_per_epoch:,} examples, "
        f"{report.total_steps:,} in all, {taken}"
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
    _show_memory(report.memory)
    for line in _runtime_lines(report.runtimes):
        out.print(line, markup=False, soft_wrap=True)
    for notice in report.notices:
        out.print(f"note: {notice}", markup=False, soft_wrap=True)
    for shown in report.previews:
        out.print(f"\n{shown.row}, the trained part marked:", markup=False, soft_wrap=True)
        out.print(_marked(shown.pieces, None if whole else _SHOWN_CHARACTERS), soft_wrap=True)


def _show_memory(memory: MemoryEstimate) -> None:
    """Show what lies in memory, and whether it fits."""
    each = "" if memory.processes == 1 else f" each of {memory.processes} processes takes"
    place = "a GPU" if memory.device == "cuda" else "the CPU"
    out.print(f"memory{each} on {place}, about, at {memory.tokens:,} tokens a forward:", markup=False)
    parts = {
        "base": memory.base,
        "adapter + optimizer": memory.adapter,
        "activations": memory.activations,
        "in flight": memory.in_flight,
        "the process itself": memory.process,
        "total": memory.total,
        "free": memory.free,
    }
    table = Table("", Column(justify="right"), box=None, show_header=False)
    for name, count in parts.items():
        table.add_row(f" {name}", "not known" if count is None else gigabytes(count))
    out.print(table)
    if memory.fits is False:
        ways = "train.activation_checkpointing, fewer train.micro_batch_tokens or data.max_length, model.quantization"
        text = f"does not fit: less is taken with {ways}; or, on several devices, with train.shard."
        out.print(Text("memory: ", style="bold red") + Text(text), soft_wrap=True)


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


# --- eval, scale ---


def show_eval(report: EvalReport) -> None:
    """Show base and adapter side by side with their intervals, and three rows of what they said."""
    counts = f"{report.rows:,} rows, {report.targets:,} targets, {report.answers:,} answers"
    out.print(f"{report.data}: {counts}; 95 % intervals in brackets", markup=False, soft_wrap=True)
    table = Table("", "base", "adapter", "difference", "the adapter is", "n", box=None)
    for name, both in {**report.figures, **report.tasks}.items():
        spec = ".1%" if name in _PERCENT else ",.2f" if name == "perplexity" else ".4f"
        cells = [
            with_interval(both.base, spec),
            with_interval(both.tuned, spec),
            with_interval(both.difference, f"+{spec}"),
        ]
        table.add_row(*map(escape, (name.replace("_", " "), *cells)), both.verdict or "-", f"{both.tuned.n:,}")
    out.print(table)
    if report.forgetting is not None:
        out.print(f"forgetting: {forgetting_in_words(report.forgetting)}", markup=False, soft_wrap=True)
    if report.scan is not None:
        show_scan(report.scan)
    for sample in report.samples[:3]:
        out.print(f"\n[bold]{escape(sample.row)}[/bold]")
        for name, text in (("expected", sample.expected), ("base", sample.base), ("adapter", sample.tuned)):
            out.print(f"  {name:9}{text[:300]}", markup=False, soft_wrap=True)
    if report.saved is not None:
        out.print(f"\nKept in {report.saved}, all answers beside it.", markup=False, soft_wrap=True)


def forgetting_in_words(found: Forgetting) -> str:
    """Return the rise on general text and the KL to the base in one sentence."""
    rise, kl = found.rise, found.kl

    return (
        f"loss on general text {found.base_loss:.4f} (base) {with_interval(rise, '+.4f')} on {found.tokens:,} tokens; "
        f"KL to the base {with_interval(kl, '.4f')} on {found.kl_tokens:,} targets"
    )


def show_scan(report: ScanReport) -> None:
    """Show what each gain learns and forgets, as a table and as a curve."""
    table = Table("gain", "loss", "change", "token accuracy", "rise on general text", "KL to the base", "", box=None)
    marks = {report.best: "lowest loss"}
    marks[report.knee] = f"{marks[report.knee]}, knee" if report.knee in marks else "knee"
    if report.best_within is not None:
        what = f"best within {report.budget:g}"
        marks[report.best_within] = f"{marks.get(report.best_within, '')}, {what}".removeprefix(", ")
    for point in report.points:
        change, rise = (with_interval(each, "+.4f") for each in (point.change, point.forgetting.rise))
        figures = (f"{point.loss.value:.4f}", change, f"{point.token_accuracy:.1%}", rise)
        kl = f"{point.forgetting.kl.value:.4f}"
        table.add_row(f"{point.gain:g}", *map(escape, figures), kl, marks.get(point.gain, ""))
    out.print(table)
    for line in _curve(report.points):
        out.print(line, markup=False)


def _curve(points: Sequence[ScanPoint], width: int = 60, height: int = 12) -> Iterator[str]:
    """Draw loss (downwards is better) over the rise on general text; each gain is a letter, from a on."""
    across = [point.forgetting.rise.value or 0.0 for point in points]
    up = [point.loss.value or 0.0 for point in points]
    cells = [[" "] * width for _ in range(height)]

    def place(value: float, values: Sequence[float], steps: int) -> int:
        span = max(values) - min(values)
        return round((value - min(values)) / span * (steps - 1)) if span else 0

    for number, (x, y) in enumerate(zip(across, up, strict=True)):
        cells[height - 1 - place(y, up, height)][place(x, across, width)] = chr(ord("a") + number)
    yield f"{max(up):8.4f} |{''.join(cells[0])}"
    yield from (f"{'':8} |{''.join(row)}" for row in cells[1:-1])
    yield f"{min(up):8.4f} |{''.join(cells[-1])}"
    yield f"{'loss':8} +{'-' * width}"
    yield f"{'':9}{min(across):+.4f}{'rise on general text':^{width - 14}}{max(across):+.4f}"
    yield f"{'':9}" + "  ".join(f"{chr(ord('a') + i)} = {point.gain:g}" for i, point in enumerate(points))


def show_scale(report: ScaleReport) -> None:
    """Show what was written, and what it forgets where that was measured."""
    out.print(
        f"Wrote {report.output}: gain {report.gain:g}, lora_alpha {report.alpha:g}.", markup=False, soft_wrap=True
    )
    if report.point is not None:
        change = report.point.change
        out.print(
            f"Loss on the held-out rows {report.point.loss.value:.4f} ({change.value:+.4f}); ", end="", markup=False
        )
        out.print(f"{forgetting_in_words(report.point.forgetting)}.", markup=False, soft_wrap=True)
