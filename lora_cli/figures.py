"""Draws comparisons: base and adapter with intervals, forgetting, the curve of a scan, a merge and what it is of."""

import string
from collections.abc import Iterator, Sequence

from rich.text import Text

from lora_cli import results, tables
from lora_cli.console import out, say
from lora_cli.curve import Series, plot
from lora_cli.errors import one_line
from lora_cli.records import with_interval
from lora_cli.reports import CombineReport, EvalReport, MergedLayer, MergeReport, ScaleReport, ScanPoint, ScanReport
from lora_cli.run_words import forgetting_in_words, scan_marks, spec_of

_ROUNDED = {"nearest": "to nearest", "stochastic": "by chance"}
_WIDEST_CURVE, _CURVE_LINES = 70, 14
_LETTERS = string.ascii_letters
_LITTLE = 0.95  # of an update left after rounding


def show_eval(report: EvalReport) -> None:
    """Show base and adapter, or tuned model, side by side with their intervals, and three rows of what they said."""
    tuned = "model" if results.is_whole_model(report.adapter) else "adapter"
    counts = f"{report.rows:,} rows, {report.targets:,} targets, {report.answers:,} answers"
    say(f"{report.data}: {counts}; 95 % intervals in brackets")
    rows = list[list[str]]()
    for name, both in {**report.figures, **report.tasks}.items():
        spec = spec_of(name)
        cells = [
            with_interval(both.base, spec),
            with_interval(both.tuned, spec),
            with_interval(both.difference, f"+{spec}"),
        ]
        rows.append([name.replace("_", " "), *cells, both.verdict or "-", f"{both.tuned.n:,}"])
    tables.show(["", "base", tuned, "difference", f"the {tuned} is", "n"], rows)
    if report.forgetting is not None:
        say(f"forgetting: {forgetting_in_words(report.forgetting)}")
    if report.scan is not None:
        show_scan(report.scan)
    for sample in report.samples[:3]:
        say("")
        say(Text(sample.row, "bold"))
        for name, text in (("expected", sample.expected), ("base", sample.base), (tuned, sample.tuned)):
            say(f"  {name:9}{one_line(text[:300])}", indent=11)
    if report.saved is not None:
        say("")
        say(f"Kept in {report.saved}, all answers beside it.")


def show_scan(report: ScanReport) -> None:
    """Show what each gain learns and forgets, as a table and as a curve."""
    rows, brief = list[list[str]](), list[list[str]]()
    marks = scan_marks(report)
    for point in report.points:
        change, rise = (with_interval(each, "+.4f") for each in (point.change, point.forgetting.rise))
        figures = (f"{point.loss.value:.4f}", change, f"{point.token_accuracy:.1%}", rise)
        kl = f"{point.forgetting.kl.value:.4f}"
        rows.append([f"{point.gain:g}", *figures, kl, marks.get(point.gain, "")])
        brief.append([f"{point.gain:g}", *(figure.split(" [")[0] for figure in figures), kl])
    heads = ["gain", "loss", "change", "token accuracy", "rise on general text", "KL to the base", ""]
    if tables.Fitting(heads, rows).fits(out, out.width):
        tables.show(heads, rows)
    else:  # intervals are in the report
        tables.show(["gain", "loss", "change", "accuracy", "rise", "KL"], brief)
        for gain, mark in sorted(marks.items()):
            say(f"gain {gain:g}: {mark}")
    for line in _curve(report.points):
        out.print(Text(line), soft_wrap=True)
    legend = [f"{_LETTERS[number]} = {point.gain:g}" for number, point in enumerate(report.points)]
    say(f"{'':9}{'  '.join(legend)}", indent=9)


def _curve(points: Sequence[ScanPoint]) -> Sequence[str]:
    """Draw loss (downwards is better) over the rise on general text; each gain is a letter, from a on."""
    series = [Series([(point.forgetting.rise.value or 0.0, point.loss.value or 0.0) for point in points], _LETTERS)]
    names, width = ("rise on general text", "loss"), min(_WIDEST_CURVE, out.width)
    return plot(series, width, _CURVE_LINES, out.options.ascii_only, names, "+.4f")


def show_scale(report: ScaleReport) -> None:
    """Show what was written, and what it forgets where that was measured."""
    say(f"Wrote {report.output}: gain {report.gain:g}, lora_alpha {report.alpha:g}.")
    if report.point is not None:
        change = report.point.change
        say(
            f"Loss on the held-out rows {report.point.loss.value:.4f} ({change.value:+.4f}); "
            f"{forgetting_in_words(report.point.forgetting)}."
        )


# --- merge ---


def show_merge(report: MergeReport | CombineReport) -> None:
    """Show what was merged, what rounding left of it, and how it compares; or the adapter that was made of several."""
    if isinstance(report, CombineReport):
        say(
            f"Wrote one adapter of {report.adapted_tensors} layers, rank {report.rank}, to {report.output}; it holds "
            f"at least {report.kept:.2%} of each layer's update."
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
        say(line)
    if report.speeds is not None:
        rows = list[list[str]]()
        for name, speed in report.speeds.items():
            figures = (speed.prompt, speed.prompt_of_base, speed.answer, speed.answer_of_base)
            rows.append([name, *(with_interval(f, spec) for f, spec in zip(figures, [".0f", ".3f"] * 2, strict=True))])
        tables.show(["tokens/s", "prompt", "of base", "answer", "of base"], rows)


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
