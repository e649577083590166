"""The curves of a run out of metrics.jsonl: smoothed, and thinned to what a screen shows without losing extremes."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

from lora_cli.json_file import is_number
from lora_cli.run_reports import Curve

BUCKETS = 240  # of a picture; each keeps its first, lowest, highest and last point
_WINDOW = 0.04  # of all steps, over which a curve is smoothed
Record = Mapping[str, Any]


def of(records: Sequence[Record]) -> dict[str, Curve]:
    """Return the curves that a run's records hold; one without any value is left out."""
    steps, evaluated = (list(_once(records, event)) for event in ("step", "evaluated"))
    read = dict(
        zip((one["step"] for one in steps), accumulate(_whole(one.get("tokens")) for one in steps), strict=True)
    )
    taken = {
        "loss": _curve(steps, read, lambda one: _number(one.get("loss"))),
        "kl_in_training": _curve(steps, read, lambda one: _number(one.get("kl"))),
        "learning_rate": _curve(steps, read, lambda one: _number(one.get("learning_rate"))),
        "grad_norm": _curve(steps, read, lambda one: _number(one.get("grad_norm"))),
        "tokens_per_second": _curve(steps, read, _speed),
    }
    known = {name: _with_breaks(curve) for name, curve in taken.items()}
    for name in ("loss", "grad_norm", "tokens_per_second"):
        known[f"{name}_smoothed"] = _with_breaks(smoothed(taken[name]))
    known |= {
        "validation_loss": _curve(evaluated, read, lambda one: _number(one.get("loss"))),
        "token_accuracy": _curve(evaluated, read, lambda one: _number(one.get("token_accuracy"))),
        "forgetting": _curve(evaluated, read, lambda one: _inside(one, "forgetting", "rise", "value")),
        "kl_to_base": _curve(evaluated, read, lambda one: _inside(one, "forgetting", "kl", "value")),
    }
    return {name: thinned(curve) for name, curve in known.items() if any(v is not None for v in curve.values)}


def smoothed(curve: Curve) -> Curve:
    """Return the mean around each step, over a window that is narrower at the ends."""
    half = round(len(curve.values) * _WINDOW / 2)
    sums = list(accumulate((value or 0.0 for value in curve.values), initial=0.0))
    counts = list(accumulate((value is not None for value in curve.values), initial=0))
    values = list[float | None]()
    for at, value in enumerate(curve.values):
        reach = min(half, at, len(curve.values) - 1 - at)
        low, high = at - reach, at + reach + 1
        values.append(None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low]))
    return Curve(curve.steps, curve.tokens, values)


def thinned(curve: Curve, buckets: int = BUCKETS) -> Curve:
    """Return at most about four points for each of equal parts of the steps: first, lowest, highest, last; and gaps."""
    if len(curve.steps) <= 4 * buckets:
        return curve
    first, span = curve.steps[0], max(curve.steps[-1] - curve.steps[0], 1)
    kept = list[int]()
    places = range(len(curve.steps))
    for _, group in groupby(places, key=lambda at: min((curve.steps[at] - first) * buckets // span, buckets - 1)):
        bucket = list(group)
        known = [(value, at) for at in bucket if (value := curve.values[at]) is not None]
        gap = next((at for at in bucket if curve.values[at] is None), None)
        extremes = {min(known)[1], max(known)[1], known[0][1], known[-1][1]} if known else set()
        kept += sorted(extremes | ({gap} if gap is not None else set()))
    return Curve([curve.steps[at] for at in kept], [curve.tokens[at] for at in kept], [curve.values[at] for at in kept])


def per_step(curve: Curve) -> float | None:
    """Return the median of a curve's values, None where it has none."""
    known = [value for value in curve.values if value is not None]
    return statistics.median(known) if known else None


def _once(records: Sequence[Record], event: str) -> Iterator[Record]:
    """Iterate over the records of one kind in the order of their steps, the last where a step has several."""
    found = {one["step"]: one for one in records if one.get("event") == event}
    yield from (found[step] for step in sorted(found))


def _curve(records: Sequence[Record], read: Mapping[int, int], value: Callable[[Record], float | None]) -> Curve:
    steps = [int(one["step"]) for one in records]
    return Curve(steps, [read.get(step, 0) for step in steps], [value(one) for one in records])


def _with_breaks(curve: Curve) -> Curve:
    """Return a curve with a gap where steps are missing, so that no line is drawn over what was not measured."""
    if not curve.steps:
        return curve
    points = list(zip(curve.steps, curve.tokens, curve.values, strict=True))
    filled = [points[0]]
    for (before, tokens, _), point in pairwise(points):
        filled += [(before + 1, tokens, None)] if point[0] > before + 1 else []
        filled.append(point)
    steps, tokens_read, values = (list(column) for column in zip(*filled, strict=True))
    return Curve(steps, tokens_read, values)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and is_number(value) else None


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _speed(record: Record) -> float | None:
    tokens, seconds = _number(record.get("tokens")), _number(record.get("seconds"))
    return tokens / seconds if tokens and seconds and seconds > 0 else None


def _inside(record: Record, *keys: str) -> float | None:
    """Return a number that lies some keys deep, None where it is not there."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return _number(value)
