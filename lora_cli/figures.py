"""Draws comparisons: base and adapter with intervals, forgetting, the curve of a scan, a merge and what it is of."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from lora_cli import results
from lora_cli.console import out
from lora_cli.records import with_interval
from lora_cli.reports import CombineReport, EvalReport, MergedLayer, MergeReport, ScaleReport, ScanPoint, ScanReport
from lora_cli.run_words import forgetting_in_words, scan_marks, spec_of

_ROUNDED = {"nearest": "to nearest", "stochastic": "by chance"}
_LITTLE = 0.95  # of an update left after rounding


def show_eval(report: EvalReport) -> None:
    """Show base and adapter, or tuned model, side by side with their intervals, and three rows of what they said."""
    tuned = "model" if results.is_whole_model(report.adapter) else "adapter"
    counts = f"{report.rows:,} rows, {report.targets:,} targets, {report.answers:,} answers"
    out.print(f"{report.data}: {counts}; 95 % intervals in brackets", markup=False, soft_wrap=True)
    table = Table("", "base", tuned, "difference", f"the {tuned} is", "n", box=None)
    for name, both in {**report.figures, **report.tasks}.items():
        spec = spec_of(name)
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
        for name, text in (("expected", sample.expected), ("base", sample.base), (tuned, sample.tuned)):
            out.print(f"  {name:9}{text[:300]}", markup=False, soft_wrap=True)
    if report.saved is not None:
        out.print(f"\nKept in {report.saved}, all answers beside it.", markup=False, soft_wrap=True)


def show_scan(report: ScanReport) -> None:
    """Show what each gain learns and forgets, as a table and as a curve."""
    table = Table("gain", "loss", "change", "token accuracy", "rise on general text", "KL to the base", "", box=None)
    marks = scan_marks(report)
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


# --- merge ---


def show_merge(report: MergeReport | CombineReport) -> None:
    """Show what was merged, what rounding left of it, and how it compares; or the adapter that was made of several."""
    if isinstance(report, CombineReport):
        out.print(
            f"Wrote one adapter of {report.adapted_tensors} layers, rank {report.rank}, to {report.output}; it holds "
            f"at least {report.kept:.2%} of each layer's update.",
            markup=False,
            soft_wrap=True,
        )
        return
    agreement = report.agreement
    lines = [
        f"Merged {report.adapted_tensors} tensors ({report.dtype}, rounded {_ROUNDED[report.rounding]}) into "
        f"{report.output}.",
        _updates(report.layers),
        f"Read back and compared with base + adapter at {agreement.positions:,} positions: largest logit difference "
        f"{agreement.largest_logit_difference:.2g} (allowed {report.bound:.2g}), KL {agreement.mean_kl:.2g}, "
        f"same first choice {agreement.top1_agreement:.2%}.",
    ]
    if report.forced:
        lines.append("This is more than is allowed: it was kept because of --force.")
    for line in [*lines, *_quantised(report)]:
        out.print(line, markup=False, soft_wrap=True)
    if report.speeds is not None:
        table = Table("tokens/s", "prompt", "of base", "answer", "of base", box=None)
        for name, speed in report.speeds.items():
            figures = (speed.prompt, speed.prompt_of_base, speed.answer, speed.answer_of_base)
            table.add_row(name, *(with_interval(f, spec) for f, spec in zip(figures, [".0f", ".3f"] * 2, strict=True)))
        out.print(table)


def _quantised(report: MergeReport) -> Iterator[str]:
    """Say of a base that was trained quantised what the update was added to, and how far either way is from that."""
    if report.quantization is None:
        return
    yield f"In training the base was quantised ({report.quantization}); merged are its {report.onto} weights."
    if report.from_trained is None:
        yield "How far that is from what was trained was not measured: this model cannot be run layer by layer."
    for onto, each in (report.from_trained or {}).items():
        loss = (
            f", loss {each.loss:.4f} (trained {each.trained_loss:.4f}, {each.targets} tokens)" if each.targets else ""
        )
        yield (
            f"Merged onto {onto} weights, from what was trained ({each.positions:,} positions): largest logit "
            f"difference {each.largest_logit_difference:.2g}, KL {each.mean_kl:.2g}, same first choice "
            f"{each.top1_agreement:.2%}{loss}."
        )


def _updates(layers: Sequence[MergedLayer]) -> str:
    sizes = sorted(layer.relative for layer in layers)
    kept = sorted((layer.kept, layer.name) for layer in layers if layer.kept is not None)
    line = f"Updates are {sizes[0]:.2g} to {sizes[-1]:.2g} of their weights (median {sizes[len(sizes) // 2]:.2g})"
    if not kept:
        return f"{line}."
    worst, name = kept[0]
    line += (
        f"; after rounding {kept[len(kept) // 2][0]:.1%} of an update is left (median), least {worst:.1%} of {name}."
    )
    if worst < _LITTLE:
        line += " --dtype float32 or --rounding stochastic keeps more."
    return line
