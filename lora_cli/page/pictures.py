"""The pictures of a report's page: the curves of one run or of several, rows by length, strengths of an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_cli.charts import Axis, Level, Point, Series, axis, bars, plot, swatch
from lora_cli.markup import Html, Piece, tag
from lora_cli.records import DataCounts, Probed
from lora_cli.reports import ScanReport
from lora_cli.run_reports import Curve, RunReport

_WIDE = 50  # times the smallest value is the largest: a picture over the logarithm


@dataclass(frozen=True)
class _Wanted:
    """A picture of a run: its curves as (name in the run, name in words, kind), in their order."""

    title: str
    about: str
    curves: Sequence[tuple[str, str, str]]
    by_tokens: bool = False


_OF_ONE = (
    _Wanted(
        "Loss",
        "nats a token, less is better",
        (
            ("loss", "each step", "faint"),
            ("loss_smoothed", "smoothed", "line"),
            ("validation_loss", "validation", "both"),
        ),
    ),
    _Wanted("Forgetting", "rise of the loss on general text", (("forgetting", "rise", "both"),)),
    _Wanted(
        "KL to the base",
        "how far the tuned model is, in nats a token",
        (("kl_to_base", "on validation targets", "both"), ("kl_in_training", "in the training loss", "line")),
    ),
    _Wanted("Token accuracy", "share of validation targets", (("token_accuracy", "validation", "both"),)),
    _Wanted("Learning rate", "at each step", (("learning_rate", "learning rate", "line"),)),
    _Wanted(
        "Gradient norm",
        "before it is clipped",
        (("grad_norm", "each step", "faint"), ("grad_norm_smoothed", "smoothed", "line")),
    ),
    _Wanted(
        "Speed",
        "tokens a second",
        (("tokens_per_second", "each step", "faint"), ("tokens_per_second_smoothed", "smoothed", "line")),
    ),
)
_OF_SEVERAL = (
    _Wanted("Validation loss", "by step", (("validation_loss", "", "both"),)),
    _Wanted("Validation loss", "by tokens read", (("validation_loss", "", "both"),), by_tokens=True),
    _Wanted("Training loss", "smoothed, by step", (("loss_smoothed", "", "line"),)),
    _Wanted("Training loss", "smoothed, by tokens read", (("loss_smoothed", "", "line"),), by_tokens=True),
    _Wanted("Forgetting", "rise of the loss on general text, by step", (("forgetting", "", "both"),)),
    _Wanted("KL to the base", "on validation targets, by step", (("kl_to_base", "", "both"),)),
    _Wanted("Learning rate", "by step", (("learning_rate", "", "line"),)),
    _Wanted("Gradient norm", "smoothed, by step", (("grad_norm_smoothed", "", "line"),)),
)


def picture(title: str, about: str, svg: Html, series: Sequence[Series] = ()) -> Html:
    """Return a picture with its title and what its lines and shapes stand for."""
    legend = [tag("li", swatch(one.style, one.kind), one.name) for one in series if one.name]
    known: Sequence[Piece] = [tag("ul", *legend, class_="legend")] if len(legend) > 1 else []
    return tag("figure", tag("figcaption", tag("b", title), " ", tag("span", about), *known), svg, class_="chart")


def grid(pictures: Sequence[Html]) -> Html:
    """Return pictures beside and below each other."""
    return tag("div", *pictures, class_="charts")


def of_run(run: RunReport) -> list[Html]:
    """Return the curves of a run; the best step is marked, and what they are held against."""
    return [drawn for wanted in _OF_ONE if (drawn := _drawn(wanted, [run], _levels(wanted, run))) is not None]


def of_runs(runs: Sequence[RunReport]) -> list[Html]:
    """Return the curves of several runs over each other."""
    return [drawn for wanted in _OF_SEVERAL if (drawn := _drawn(wanted, runs, [])) is not None]


def _levels(wanted: _Wanted, run: RunReport) -> list[Level]:
    levels = list[Level]()
    if wanted.title == "Loss" and run.base is not None:
        levels.append(Level(f"base {run.base.loss:.3f}", run.base.loss))
    if wanted.title == "Forgetting" and run.budget is not None:
        levels.append(Level(f"budget {run.budget:g}", run.budget))
    if wanted.title == "Gradient norm":
        levels.append(Level(f"clipped to {run.max_grad_norm:g}", run.max_grad_norm))
    if wanted.title in ("Loss", "Forgetting", "Token accuracy", "KL to the base") and run.best is not None:
        levels.append(Level(f"best: step {run.best.step:,}", run.best.step, down=True))
    return levels


def _drawn(wanted: _Wanted, runs: Sequence[RunReport], levels: Sequence[Level]) -> Html | None:
    series = [
        Series(name if len(runs) == 1 else run.name, _points(run.curves[key], wanted.by_tokens), style, kind)  # type: ignore[arg-type]
        for number, run in enumerate(runs)
        for place, (key, name, kind) in enumerate(wanted.curves)
        if key in run.curves
        for style in [number if len(runs) > 1 else max(0, place - (wanted.curves[0][2] == "faint"))]
    ]
    values = [value for one in series for _, value in one.points if value is not None]
    if not values:
        return None
    wide = min(values) > 0 and max(values) > _WIDE * min(values) and wanted.title in ("Gradient norm", "Loss")
    held = [level.value for level in levels if not level.down]
    across = axis("tokens" if wanted.by_tokens else "step", [at for one in series for at, _ in one.points], exact=True)
    down = axis(wanted.about, [*values, *held], log=wide)
    about = f"{wanted.title}, {wanted.about}: {', '.join(filter(None, (_in_words(one) for one in series)))}"
    return picture(wanted.title, wanted.about, plot(series, across, down, about, levels), series)


def _points(curve: Curve, by_tokens: bool) -> list[Point]:
    return list(zip(curve.tokens if by_tokens else curve.steps, curve.values, strict=True))


def _in_words(series: Series) -> str:
    known = [value for _, value in series.points if value is not None]
    return f"{series.name} from {known[0]:.4g} to {known[-1]:.4g}" if known else ""


# --- other pictures ---


def lengths(name: str, counts: DataCounts) -> Html | None:
    """Return how many sequences of a set are how long."""
    if not counts.length_histogram or not counts.length_percentiles:
        return None
    across = Axis("tokens", 0, max(counts.length_percentiles[-1], 1))
    up = Axis("sequences", 0, 1.08 * max(*counts.length_histogram, 1))
    about = f"Lengths of {name}: half have at most {counts.length_percentiles[0]:,} tokens, the longest "
    svg = bars(counts.length_histogram, across, up, f"{about}{counts.length_percentiles[-1]:,}")
    return picture(f"Lengths: {name}", "sequences by tokens", svg)


def scan(report: ScanReport) -> Html:
    """Return what an adapter learns against what it forgets, at each gain."""
    points = [(point.forgetting.rise.value or 0.0, point.loss.value) for point in report.points]
    series = Series("gain", points, 0, "both", [f"{point.gain:g}" for point in report.points])
    budget = [Level(f"budget {report.budget:g}", report.budget, down=True)] if report.budget is not None else []
    across = axis("rise of the loss on general text", [*(x for x, _ in points), *(level.value for level in budget)])
    down = axis("loss", [y for _, y in points])
    about = "Loss on the held-out rows over forgetting; each point is a gain of the adapter"
    return picture("Learned against forgotten", "each point is a gain", plot([series], across, down, about, budget))


def rates(tried: Sequence[Probed], chosen: float | None) -> Html:
    """Return the learning rates that were tried, over the logarithm."""
    points: list[Point] = [(one.rate, one.loss) for one in sorted(tried, key=lambda one: one.rate)]
    levels = [Level(f"chosen {chosen:g}", chosen, down=True)] if chosen else []
    across = axis("learning rate", [*(rate for rate, _ in points), *([chosen] if chosen else [])], log=True)
    svg = plot(
        [Series("tried", points, 0, "both")],
        across,
        axis("validation loss", [loss for _, loss in points]),
        "Validation loss of each learning rate that was tried",
        levels,
    )
    return picture("Learning rates tried", "validation loss after a share of the steps", svg)
