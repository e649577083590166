"""Pictures of numbers as SVG, each by one pure function: lines and points over two axes, bars.

Colours and dashes are classes, which the page that holds a picture gives light and dark ones; what a colour says is
also said by a dash, a shape or a word.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lora_cli.markup import Html, tag

WIDTH, HEIGHT = 480, 260  # of the coordinates; a picture is as wide as its place
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 472, 20, 216
STYLES = 6  # classes s0 ... of colours and dashes
_TICKS = 5
Point = tuple[float, float | None]  # None: here the line is broken


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`; one of words has the `names` of the places 0, 1, ..."""

    label: str
    low: float
    high: float
    log: bool = False
    names: Sequence[str] = ()

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 at the low end to 1 at the high one."""
        low, at, high = self.low, value, self.high
        if self.log:
            low, at, high = math.log(low), math.log(max(at, 1e-300)), math.log(high)
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """Points of one kind: joined by a line (a faint one for what is raw), marked one by one, or both."""

    name: str
    points: Sequence[Point]
    style: int
    kind: Literal["line", "faint", "dots", "both"] = "line"
    labels: Sequence[str] = ()  # a word for each point


@dataclass(frozen=True)
class Level:
    """A value to hold others against, as a line across (or, of x, down) the picture."""

    name: str
    value: float
    down: bool = False


def axis(label: str, values: Iterable[float | None], log: bool = False, exact: bool = False) -> Axis:
    """Return an axis that holds values, with a little room on either side, unless it is to end `exact`ly with them."""
    known = [v for v in values if v is not None and (v > 0 or not log)]
    low, high = min(known, default=1.0), max(known, default=1.0)
    if log:
        room = 1.0 if exact and low < high else max((high / low) ** 0.06, 1.05)
        return Axis(label, low / room, high * room, log)
    room = 0.0 if exact and low < high else 0.09 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(label, low - room, high + room, log)


def words(label: str, names: Sequence[str]) -> Axis:
    """Return an axis of words, each in the middle of its place."""
    return Axis(label, -0.5, len(names) - 0.5, names=names)


def figure(value: float) -> str:
    """Return a number in few digits: 10,000, 0.25, 3e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}".replace("e+0", "e")
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}".replace("e-0", "e-")


def ticks(of: Axis) -> list[tuple[float, str]]:
    """Return about five round values of an axis, and how they are written."""
    if of.names:
        return list(enumerate(of.names))
    if not of.log:
        step = _round_step((of.high - of.low) / _TICKS)
        first = math.ceil(of.low / step - 1e-9)
        values = [number * step for number in range(first, math.floor(of.high / step + 1e-9) + 1)]
        return [(value, figure(0.0 if abs(value) < step / 2 else float(f"{value:.10g}"))) for value in values]
    first, last = math.floor(math.log10(of.low)), math.ceil(math.log10(of.high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        inside = [value for value in values if of.low <= value <= of.high]
        if len(inside) >= 3:
            break
    every = -(-len(inside) // (_TICKS + 2)) or 1
    return [(value, figure(value)) for value in inside[::every]]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * least)


# --- pictures ---


def plot(series: Sequence[Series], x: Axis, y: Axis, about: str, levels: Sequence[Level] = ()) -> Html:
    """Draw series over two axes; `about` says in words what is seen."""
    parts = [*_frame(x, y), *(part for level in levels for part in _level(level, series, x, y))]
    parts += [_drawn(one, x, y) for one in series]
    return _picture(parts, about, data_x=x.label)


def bars(counts: Sequence[int], x: Axis, y: Axis, about: str) -> Html:
    """Draw a histogram of equal steps from one end of x to the other."""
    wide = (x.high - x.low) / max(len(counts), 1)
    parts = list(_frame(x, y))
    for number, count in enumerate(counts):
        low, high = x.low + number * wide, x.low + (number + 1) * wide
        left, right, top = _x(x, low), _x(x, high), _y(y, count)
        said = tag("title", f"{low:,.0f} to {high:,.0f}: {count:,}")
        parts.append(bar(left + 1, top, right - left - 2, _BOTTOM - top, "f0", said))
    return _picture(parts, about)


def bar(x: float, y: float, width: float, height: float, class_: str, inside: Html | None = None) -> Html:
    """Draw a rectangle."""
    numbers = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0)}
    return tag("rect", inside, class_=class_, **{name: f"{value:.1f}" for name, value in numbers.items()})


def text(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None) -> Html:
    """Write words at a place."""
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """Draw a straight line."""
    numbers = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return tag("line", class_=class_, **{name: f"{value:.1f}" for name, value in numbers.items()})


def swatch(style: int, kind: str = "line") -> Html:
    """Draw what stands for a series in a legend."""
    parts = [] if kind == "dots" else [line(0, 6, 26, 6, _classes(style, kind))]
    parts += [_marker(style, 13, 6)] if kind in ("dots", "both") else []
    return tag("svg", *parts, viewBox="0 0 26 12", class_="swatch", aria_hidden="true")


def _picture(parts: Iterable[Html], about: str, **more: object) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=about, **more)


def _x(x: Axis, value: float) -> float:
    return _LEFT + x.share(value) * (_RIGHT - _LEFT)


def _y(y: Axis, value: float) -> float:
    return _BOTTOM - y.share(value) * (_BOTTOM - _TOP)


def _frame(x: Axis, y: Axis) -> Iterator[Html]:
    for value, name in ticks(y):
        yield line(_LEFT, _y(y, value), _RIGHT, _y(y, value), "grid")
        yield text(_LEFT - 6, _y(y, value) + 4, name, "end", "tick")
    for value, name in ticks(x):
        at = _x(x, value)
        yield text(at, _BOTTOM + 17, name, _anchor(at, name), "tick")
    yield line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis")
    yield text(_RIGHT, _BOTTOM + 36, x.label, "end", "label")


def _level(level: Level, series: Sequence[Series], x: Axis, y: Axis) -> Iterator[Html]:
    """Draw a level; its name stands above the picture, or on the side of the line where the series do not end."""
    if level.down:
        at = _x(x, level.value)
        yield line(at, _TOP, at, _BOTTOM, "level down")
        yield text(at, _TOP - 7, level.name, _anchor(at, level.name), "name")
        return
    at = _y(y, level.value)
    ends = [[value for _, value in one.points if value is not None][-1:] for one in series]
    above = sum(value > level.value for end in ends for value in end)
    yield line(_LEFT, at, _RIGHT, at, "level")
    is_below = 2 * above > len(ends) and at < _BOTTOM - 14
    yield text(_RIGHT, at + 13 if is_below else at - 5, level.name, "end", "name")


def _anchor(at: float, words: str) -> str:
    """Return how words stand at a place: in the middle, unless an edge is near."""
    half = 3.5 * len(words)
    return "end" if at + half > WIDTH else "start" if at - half < 0 else "middle"


def _drawn(series: Series, x: Axis, y: Axis) -> Html:
    places = [(_x(x, at), None if value is None else _y(y, value)) for at, value in series.points]
    known = [(across, down) for across, down in places if down is not None]
    parts = list[Html]()
    if series.kind != "dots":
        parts.append(tag("path", class_=_classes(series.style, series.kind), d=_path(places)))
    if series.kind in ("dots", "both"):
        parts += [_marker(series.style, across, down) for across, down in known]
    for (across, down), word in zip(known, series.labels, strict=False):
        parts.append(text(across + 6, down - 7, word, "end" if across > _RIGHT - 24 else "start", "name"))
    seen = [(at, value) for at, value in series.points if value is not None]
    values = ";".join(f"{figure(at)}:{_exact(value)}" for at, value in seen)
    spots = ";".join(f"{across:.1f},{down:.1f}" for across, down in known)
    return tag("g", *parts, class_="series", data_name=series.name, data_values=values, data_spots=spots)


def _exact(value: float) -> str:
    return f"{value:.5g}"


def _path(places: Sequence[tuple[float, float | None]]) -> str:
    """Return the path of a line: a point that stands alone between two breaks is a dash of its own."""
    pieces, pen = list[str](), False
    for across, down in places:
        if down is not None:
            pieces.append(f"{'L' if pen else 'M'}{across:.1f},{down:.1f}")
        pen = down is not None
    begins = [piece[0] for piece in pieces]
    alone = {number for number, (one, after) in enumerate(pairwise([*begins, "M"])) if one == after == "M"}
    return "".join(f"{piece}h.5" if number in alone else piece for number, piece in enumerate(pieces))


def _classes(style: int, kind: str) -> str:
    return f"s{style % STYLES} {'faint' if kind == 'faint' else 'line'}"


_SHAPES: Mapping[int, str] = {
    0: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # a circle
    1: "M-4,-4h8v8h-8z",
    2: "M0,-5L5,4H-5z",
    3: "M0,-5L5,0L0,5L-5,0z",
    4: "M-5,-4H5L0,5z",
    5: "M-4,-4L4,4M-4,4L4,-4",
}


def _marker(style: int, x: float, y: float) -> Html:
    at = f"translate({x:.1f} {y:.1f})"
    return tag("path", class_=f"s{style % STYLES} mark", d=_SHAPES[style % STYLES], transform=at)
