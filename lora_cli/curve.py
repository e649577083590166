"""Plots in characters: a pure function from series of points to lines of text."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: left, right; from the top down
_BRAILLE = 0x2800
_LEVELS = "'-."  # a cell's three heights in ASCII
_Place = Callable[[float], float]  # where a value lies, as a share of the axis


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a plot: shown by `marks`, one each by turns, or without any as a line."""

    points: Sequence[tuple[float, float]]
    marks: str = ""


def plot(
    series: Sequence[Series], width: int, height: int, ascii: bool, names: tuple[str, str] = ("", ""), form: str = "g"
) -> list[str]:
    """Return lines of at most `width` characters, `height` of them, with both axes and what they reach to.

    `names` are of the axis across and of the one upwards, `form` is the number format of the one across. Points that
    are not finite are left out, and marks lie over lines.
    """
    shown = [Series([point for point in one.points if all(map(math.isfinite, point))], one.marks) for one in series]
    xs, ys = ([point[axis] for one in shown for point in one.points] for axis in (0, 1))
    low, high = (f"{min(ys):.4f}", f"{max(ys):.4f}") if ys else ("", "")
    first, last = (f"{min(xs):{form}}", f"{max(xs):{form}}") if xs else ("", "")
    margin = max(len(low), len(high), len(names[1]))
    columns, rows = max(1, width - margin - 2), max(2, height - 2)
    cells = _cells(shown, columns, rows, ascii, _place(xs), _place(ys))
    labels = [high, *[""] * (rows - 2), low]
    bar, corner, dash = ("|", "+", "-") if ascii else ("│", "└", "─")
    lines = [f"{label:>{margin}} {bar}{''.join(row).rstrip()}" for label, row in zip(labels, cells, strict=True)]
    between = max(0, columns - len(first) - len(last))
    scale = f"{first}{names[0][:between]:^{between}}{last}"
    return [*lines, f"{names[1]:>{margin}} {corner}{dash * columns}", f"{'':{margin}}  {scale}".rstrip()]


def _place(values: Sequence[float]) -> _Place:
    least, span = (min(values), max(values) - min(values)) if values else (0.0, 0.0)
    return lambda value: (value - least) / span if span else 0.0


def _cells(
    series: Sequence[Series], columns: int, rows: int, ascii: bool, across: _Place, up: _Place
) -> list[list[str]]:
    """Return the area between the axes, from the top row down."""
    cells = [[" "] * columns for _ in range(rows)]
    wide, tall = (1, 3) if ascii else (2, 4)  # dots of a cell
    for one in series:
        if not one.marks:
            points = [(across(x) * (columns * wide - 1), up(y) * (rows * tall - 1)) for x, y in one.points]
            for column, row in _line(points):
                _dot(cells, column, rows * tall - 1 - row, ascii)
    for one in series:
        for (x, y), mark in zip(one.points, cycle(one.marks) if one.marks else (), strict=False):
            cells[rows - 1 - round(up(y) * (rows - 1))][round(across(x) * (columns - 1))] = mark
    return cells


def _line(points: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """Yield the dots of a line without gaps: the mean in each column, columns between joined."""
    by_column = defaultdict[int, list[float]](list)
    for x, y in points:
        by_column[round(x)].append(y)
    known = [(column, sum(ys) / len(ys)) for column, ys in sorted(by_column.items())]
    yield from ((column, round(y)) for column, y in known[:1])
    for (left, low), (right, high) in pairwise(known):
        before = round(low)
        for column in range(left + 1, right + 1):
            row = round(low + (high - low) * (column - left) / (right - left))
            yield column, row
            yield from ((column, between) for between in range(min(before, row) + 1, max(before, row)))
            before = row


def _dot(cells: list[list[str]], column: int, row: int, ascii: bool) -> None:
    """Add a dot, counted from the top left, to the cell that it lies in."""
    if ascii:
        cells[row // 3][column] = _LEVELS[row % 3]
        return
    there = cells[row // 4][column // 2]
    dots = ord(there) if there != " " else _BRAILLE
    cells[row // 4][column // 2] = chr(dots | _DOTS[column % 2][row % 4])
