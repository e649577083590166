"""Draws comparisons of base and adapter: figures with their intervals, forgetting, the curve of a scan."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from lora_cli.console import out
from lora_cli.records import Forgetting, with_interval
from lora_cli.reports import EvalReport, ScaleReport, ScanPoint, ScanReport

_PERCENT = ("token_accuracy", "exact_match", "label_accuracy", "json_valid", "json_fields", "rouge_l", "bleu", "chrf")


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
