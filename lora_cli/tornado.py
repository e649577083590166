"""The picture of a sensitivity report, as SVG: a bar to either side for each knob, the noise of seeds behind them."""

from collections.abc import Iterator
from html import escape

from lora_cli.records import short
from lora_cli.search_reports import Knob, SensitivityReport

_LEFT, _PLOT, _RIGHT, _ROW, _TOP = 200, 440, 40, 34, 56  # pixels
_HALVED, _DOUBLED, _NOISE, _TEXT = "#3b78b5", "#d1762a", "#e6e6e6", "#222222"


def svg(report: SensitivityReport) -> str:
    """Return the picture: changes of validation loss, less is to the left; what did not end is a bar to the edge."""
    known = [abs(change) for knob in report.knobs for change in knob.changes if change is not None]
    reach = 1.1 * max(*known, report.noise or 0.0, 1e-9)
    height = _TOP + _ROW * len(report.knobs) + 50
    body = "\n".join(_parts(report, reach))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _PLOT + _RIGHT}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{_TEXT}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _parts(report: SensitivityReport, reach: float) -> Iterator[str]:
    middle, unit = _LEFT + _PLOT / 2, _PLOT / 2 / reach
    bottom = _TOP + _ROW * len(report.knobs)
    title = f"Validation loss {report.loss:.4f}; what half and twice of each knob change"
    yield _text(_LEFT, 20, title, "start")
    for x, colour, name in ((_LEFT, _HALVED, "half"), (_LEFT + 70, _DOUBLED, "twice")):
        yield _bar(x, 32, 10, 10, colour) + _text(x + 15, 41, name, "start")
    if report.noise is not None:
        wide = report.noise * unit
        yield _bar(_LEFT + 150, 32, 10, 10, _NOISE) + _text(_LEFT + 165, 41, "what another seed may change", "start")
        yield _bar(middle - wide, _TOP, 2 * wide, bottom - _TOP, _NOISE)
    for number, knob in enumerate(report.knobs):
        yield from _knob(knob, _TOP + number * _ROW, middle, unit, reach)
    yield f'<line x1="{middle}" y1="{_TOP}" x2="{middle}" y2="{bottom}" stroke="{_TEXT}"/>'
    for share in (-1, -0.5, 0, 0.5, 1):
        yield _text(middle + share * _PLOT / 2, bottom + 18, f"{share * reach:+.3g}" if share else "0", "middle")
    yield _text(middle, bottom + 38, "change of validation loss (less is better)", "middle")


def _knob(knob: Knob, top: float, middle: float, unit: float, reach: float) -> Iterator[str]:
    yield _text(_LEFT - 10, top + 15, knob.key, "end")
    yield _text(_LEFT - 10, top + 28, " · ".join(map(short, sorted((knob.value, *knob.values)))), "end")
    for value, change in zip(knob.values, knob.changes, strict=True):
        row, colour = (0, _HALVED) if value < knob.value else (1, _DOUBLED)
        to = reach if change is None else change
        yield _bar(min(middle, middle + to * unit), top + 4 + 13 * row, abs(to) * unit, 11, colour)
        if change is None:
            yield _text(middle + reach * unit - 4, top + 13 + 13 * row, "training stopped", "end")


def _bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
