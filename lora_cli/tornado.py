"""The picture of a sensitivity report, as SVG: a bar to either side for each knob, the noise of seeds behind them."""

from collections.abc import Iterator

from lora_cli.charts import bar, line, text
from lora_cli.markup import Html, tag
from lora_cli.records import short
from lora_cli.search_reports import Knob, SensitivityReport, change_in_words

_LEFT, _PLOT, _RIGHT, _ROW, _TOP = 200, 440, 40, 34, 56  # pixels
_STYLE = """
svg { font: 12px sans-serif; fill: #222 } .paper { fill: white } .axis { stroke: #222 }
.f0 { fill: #3b78b5 } .f1 { fill: #d1762a } .noise { fill: #e6e6e6 }
"""


def svg(report: SensitivityReport) -> str:
    """Return the picture as a file: changes of validation loss, less is to the left."""
    return _whole(report, tag("style", Html(_STYLE)), bar(0, 0, _width(), _height(report), "paper")).text + "\n"


def picture(report: SensitivityReport) -> Html:
    """Return the picture for a page that has colours of its own."""
    return _whole(report)


def _width() -> int:
    return _LEFT + _PLOT + _RIGHT


def _height(report: SensitivityReport) -> int:
    return _TOP + _ROW * len(report.knobs) + 50


def _whole(report: SensitivityReport, *before: Html) -> Html:
    known = [abs(change) for knob in report.knobs for change in knob.changes if change is not None]
    reach = 1.1 * max(*known, report.noise or 0.0, 1e-9)
    about = "What half and twice of each knob change of the validation loss"
    size = {"width": _width(), "height": _height(report), "viewBox": f"0 0 {_width()} {_height(report)}"}
    place = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria_label": about}
    return tag("svg", *before, *_parts(report, reach), **size, **place)


def _parts(report: SensitivityReport, reach: float) -> Iterator[Html]:
    middle, unit = _LEFT + _PLOT / 2, _PLOT / 2 / reach
    bottom = _TOP + _ROW * len(report.knobs)
    yield text(_LEFT, 20, f"Validation loss {report.loss:.4f}; what half and twice of each knob change")
    for x, class_, name in ((_LEFT, "f0", "half"), (_LEFT + 70, "f1", "twice")):
        yield bar(x, 32, 10, 10, class_)
        yield text(x + 15, 41, name)
    if report.noise is not None:
        wide = report.noise * unit
        yield bar(_LEFT + 150, 32, 10, 10, "noise")
        yield text(_LEFT + 165, 41, "what another seed may change")
        yield bar(middle - wide, _TOP, 2 * wide, bottom - _TOP, "noise")
    for number, knob in enumerate(report.knobs):
        yield from _knob(knob, _TOP + number * _ROW, middle, unit, reach)
    yield line(middle, _TOP, middle, bottom, "axis")
    for share in (-1, -0.5, 0, 0.5, 1):
        yield text(middle + share * _PLOT / 2, bottom + 18, f"{share * reach:+.3g}" if share else "0", "middle")
    yield text(middle, bottom + 38, "change of validation loss (less is better)", "middle")


def _knob(knob: Knob, top: float, middle: float, unit: float, reach: float) -> Iterator[Html]:
    """Draw half of a knob above, twice below; what did not end is a bar to the edge."""
    yield text(_LEFT - 10, top + 15, knob.key, "end")
    yield text(_LEFT - 10, top + 28, " · ".join(map(short, sorted((knob.value, *knob.values)))), "end")
    for value, change in zip(knob.values, knob.changes, strict=True):
        row, class_ = (0, "f0") if value < knob.value else (1, "f1")
        to = reach if change is None else change
        yield bar(min(middle, middle + to * unit), top + 4 + 13 * row, abs(to) * unit, 11, class_)
        if change is None:
            yield text(middle + reach * unit - 4, top + 13 + 13 * row, change_in_words(change), "end")
