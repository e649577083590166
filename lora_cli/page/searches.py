"""What a report's page shows of searches: trials, what each key did, knobs, LoRA beside full fine-tuning."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from lora_cli import tornado
from lora_cli.charts import Axis, Series, axis, plot, words
from lora_cli.json_file import is_number
from lora_cli.markup import Html, joined, tag
from lora_cli.page.pictures import grid, picture
from lora_cli.page.tables import table
from lora_cli.records import TrialEnded, gigabytes, short, with_interval
from lora_cli.run_reports import SearchReport
from lora_cli.search_reports import AgainstFullReport, Knob, SensitivityReport, Side, TuneReport, change_in_words

_STATES = ("finished", "pruned", "diverged")


def search(found: SearchReport) -> Html:
    """Return one search."""
    parts = list[Html]()
    if found.tune is not None:
        parts += [_trials(found.tune), grid(list(_plots(found.tune, found.logarithmic)))]
    if found.sensitivity is not None:
        parts += list(_knobs(found.sensitivity))
    if found.against_full is not None:
        parts += list(_sides(found.against_full))
    return joined(parts)


# --- trials ---


def _trials(report: TuneReport) -> Html:
    keys = _keys(report)
    both = any(one.forgetting is not None for one in report.trials)
    rows = [
        (
            str(one.number),
            *(short(one.values.get(key, "-")) for key in keys),
            "-" if one.loss is None else f"{one.loss:.4f}",
            *(["-" if one.forgetting is None else f"{one.forgetting:+.4f}"] if both else []),
            f"{one.steps:,} of {one.of_steps:,}",
            report.note(one),
        )
        for one in report.in_order()
    ]
    head = ("trial", *keys, "validation loss", *(["rise on general text"] if both else []), "steps", "")
    return table("Trials, the best first", head, rows)


def _keys(report: TuneReport) -> list[str]:
    return list(dict.fromkeys(key for one in report.trials for key in one.values))


def _plots(report: TuneReport, logarithmic: Sequence[str]) -> Iterator[Html]:
    """Draw the best so far, and the loss over each key that was searched."""
    known = [one for one in sorted(report.trials, key=lambda one: one.number) if one.loss is not None]
    if not known:
        return
    down = axis("validation loss", [one.loss for one in known])
    numbers = {one.number: float(one.number) for one in known}
    best = accumulate((one.loss if one.state == "finished" else None for one in known), _lower)
    line = Series("best so far", list(zip(numbers.values(), best, strict=True)), 0)
    series = [line, *_by_state(known, numbers)]
    across = axis("trial", numbers.values())
    about = "Validation loss of each trial, and the best so far"
    yield picture("Best so far", "validation loss by trial", plot(series, across, down, about), series)
    for key in _keys(report):
        tried = [one for one in known if key in one.values]
        across, places = _axis_of(key, [one.values[key] for one in tried], key in logarithmic)
        series = _by_state(tried, dict(zip((one.number for one in tried), places, strict=True)))
        about = f"Validation loss of each trial over {key}"
        yield picture(key, "validation loss over its value", plot(series, across, down, about), series)


def _lower(before: float | None, loss: float | None) -> float | None:
    known = [each for each in (before, loss) if each is not None]
    return min(known, default=None)


def _by_state(trials: Sequence[TrialEnded], places: dict[int, float]) -> list[Series]:
    """Return the trials as points, those of one state with one shape."""
    found = [
        Series(state, [(places[one.number], one.loss) for one in trials if one.state == state], style, "dots")
        for style, state in enumerate(_STATES)
    ]
    return [one for one in found if one.points]


def _axis_of(key: str, values: Sequence[Any], log: bool) -> tuple[Axis, list[float]]:
    """Return an axis for the values of a key, and where on it they lie: words where they are not all numbers."""
    if all(map(is_number, values)):
        return axis(key, values, log=log and min(values) > 0), [float(value) for value in values]
    names = sorted(set(map(short, values)))
    return words(key, names), [float(names.index(short(value))) for value in values]


# --- one knob at a time ---


def _knobs(report: SensitivityReport) -> Iterator[Html]:
    yield tag("p", report.around())
    if report.knobs:
        yield tag("figure", tornado.picture(report), class_="tornado", tabindex="0")
        yield table("What half and twice of each knob change", _KNOB_HEAD, map(_knob, report.knobs))


_KNOB_HEAD = ("key", "value", "change at half", "change at twice", "more than a seed")


def _knob(knob: Knob) -> Sequence[str]:
    cells = ["-" if side is None else change_in_words(side[1]) for side in knob.sides()]
    return (knob.key, short(knob.value), *cells, knob.verdict())


# --- against full ---


def _sides(report: AgainstFullReport) -> Iterator[Html]:
    reached = f"LoRA reaches {with_interval(report.share, '.1%')} of the full run's gain. " if report.share else ""
    difference = f"Its loss less that of full: {with_interval(report.difference, '+.4f')}."
    yield tag("p", f"{reached}{difference}")
    head = ("", "learning rate", "loss", "change from base", "parameters", "peak memory", "seconds a step")
    yield table(f"On {report.data}, {report.targets:,} trained tokens", head, map(_side, (report.lora, report.full)))


def _side(side: Side) -> Sequence[str]:
    loss, change = with_interval(side.loss, ".4f"), with_interval(side.change, "+.4f")
    figures = (
        f"{side.learning_rate:.2g}",
        loss,
        change,
        f"{side.parameters:,}",
        gigabytes(side.peak_memory),
        f"{side.seconds:.3g}",
    )
    return (side.method, *figures)
