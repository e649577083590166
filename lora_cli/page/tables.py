"""The tables of a report's page."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_cli.markup import Html, Piece, joined, tag
from lora_cli.records import DataCounts, Evaluated, with_interval
from lora_cli.redact import cut
from lora_cli.reports import Comparison, EvalReport, Sample, ScanReport
from lora_cli.run_reports import Difference, RunReport, Setting
from lora_cli.run_words import scan_marks, spec_of

_FIGURE = re.compile(r"[-+−]?[\d.,]+( |%|$|e-)|-$")
_LONGEST = 4000  # characters of a prompt or an answer that are shown
_HIDDEN_KEYS = ("data", "format")  # of environment.json, which stand elsewhere


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Piece]]) -> Html:
    """Return a table that scrolls inside its own box; a row's first cell is its name, figures stand to the right."""
    lines = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell, class_=_side(cell)) for cell in row[1:]))
        for row in rows
    ]
    heads = tag("tr", *(tag("th", name, scope="col") for name in head))
    inside = tag("table", tag("caption", tag("span", caption)), tag("thead", heads), tag("tbody", *lines))
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _side(cell: Piece) -> str | None:
    return "n" if isinstance(cell, str) and _FIGURE.match(cell) else None


def folded(title: str, *inside: Piece, is_open: bool = False) -> Html:
    """Return what is seen when its title is opened."""
    return tag("details", tag("summary", title), *inside, open="" if is_open else None)


# --- config and surroundings ---


def settings(found: Sequence[Setting]) -> Html:
    """Return the config: what was set, then what was left at its default."""
    head = ("key", "value", "where it comes from")
    rows = [
        (
            (tag("code", one.key), tag("code", one.value), one.origin or "unknown"),
            one.is_default and one.origin in (None, "default"),
        )
        for one in found
    ]
    own, left = ([row for row, is_left in rows if is_left is wanted] for wanted in (False, True))
    rest = table("Left at their defaults", head, left)
    return joined([table("What was set", head, own), folded(f"{len(left)} keys left at their defaults", rest)])


def changes(found: Sequence[Mapping[str, Any]]) -> Html | None:
    """Return what of its settings changed while a run ran."""
    rows = [[str(one.get(name)) for name in ("key", "step", "before", "after")] for one in found]
    return table("Changed while it ran", ("key", "after step", "before", "after"), rows) if rows else None


def surroundings(run: RunReport) -> Html:
    """Return environment.json."""
    rows = [
        (key.replace("_", " "), tag("code", str(value)))
        for key, value in run.environment.items()
        if key not in _HIDDEN_KEYS and value is not None
    ]
    return table("Versions, device and fingerprints", ("", "value"), rows)


def differences(caption: str, found: Sequence[Difference], names: Sequence[str]) -> Html:
    """Return only what is not the same in all runs."""
    rows = [(tag("code", one.key), *(tag("code", value) for value in one.values)) for one in found]
    return table(caption, ("key", *names), rows) if rows else tag("p", f"{caption}: nothing.")


def results(runs: Sequence[RunReport]) -> Html:
    """Return what runs came to, a row each."""
    head = (
        "run",
        "status",
        "steps",
        "tokens",
        "best validation loss",
        "change from base",
        "at step",
        "rise on general",
    )
    return table("A row for each run, as it stands", (*head, "test loss, change"), map(_result, runs))


def _result(run: RunReport) -> Sequence[str]:
    best, base, test = run.best, run.base, run.finished.test if run.finished else None
    figures = ("-", "-", "-")
    if best is not None:
        change = "-" if base is None else f"{best.loss - base.loss:+.4f}"
        figures = (f"{best.loss:.4f}", change, f"{best.step:,}")
    rise = _rise(best)
    tested = with_interval(test.change, "+.4f") if test else "-"
    return (run.name, run.status, f"{run.step:,}", f"{run.tokens:,}", *figures, rise, tested)


def _rise(best: Evaluated | None) -> str:
    return with_interval(best.forgetting.rise, "+.4f") if best and best.forgetting else "-"


# --- data ---

_COUNTS = {
    "rows": "rows",
    "examples": "examples",
    "tokens": "tokens",
    "targets": "trained tokens",
    "dropped": "examples dropped (too long, or nothing to train)",
    "truncated": "examples cut as too long",
    "lost_targets": "trained tokens lost by that",
    "duplicates": "rows that repeat another",
    "control_rows": "rows with control tokens in their content",
    "lossy": "answers that the tokenizer writes differently",
    "blank": "rows with a blank question",
    "without_tools": "rows whose tools the template leaves out",
    "secrets": "rows with what looks like a secret",
}


def counts(sets: Mapping[str, DataCounts]) -> Html:
    """Return what the sets of rows hold; of what can be wrong with rows only what is there."""
    rows = [
        (name, *(f"{getattr(one, key):,}" for one in sets.values()))
        for key, name in _COUNTS.items()
        if key in ("rows", "examples", "tokens", "targets") or any(getattr(one, key) for one in sets.values())
    ]
    for key, name in (("length_percentiles", "tokens"), ("target_percentiles", "trained tokens")):
        cells = [" / ".join(f"{length:,}" for length in getattr(one, key)) or "-" for one in sets.values()]
        rows.append((f"{name} that 50 / 90 / 99 / 100 % of the examples have at most", *cells))
    return table("Rows and tokens of each set", ("", *sets), rows)


def sources(sets: Mapping[str, DataCounts]) -> Html:
    """Return which file gave what to which set."""
    rows = [
        (one.name, name, one.format, f"{one.rows:,}", f"{one.examples:,}", ", ".join(one.unread) or "none")
        for name, found in sets.items()
        for one in found.sources
    ]
    return table("Files", ("file", "set", "format", "rows", "examples", "columns that nothing reads"), rows)


# --- what was measured ---


def compared(figures: Mapping[str, Comparison], caption: str) -> Html:
    """Return figures of base and tuned model side by side."""
    rows = []
    for name, both in figures.items():
        spec = spec_of(name)
        cells = (with_interval(both.base, spec), with_interval(both.tuned, spec))
        verdict = tag("span", both.verdict or "-", class_=f"verdict {(both.verdict or 'none').split()[0]}")
        more = (with_interval(both.difference, f"+{spec}"), verdict, f"{both.tuned.n:,}")
        rows.append((name.replace("_", " "), *cells, *more))
    return table(caption, ("", "base", "tuned", "difference", "tuned is", "n"), rows)


def scanned(report: ScanReport) -> Html:
    """Return what each gain learns and forgets."""
    marks = scan_marks(report)
    rows = [
        (
            f"{point.gain:g}",
            with_interval(point.loss, ".4f"),
            with_interval(point.change, "+.4f"),
            f"{point.token_accuracy:.1%}",
            with_interval(point.forgetting.rise, "+.4f"),
            with_interval(point.forgetting.kl, ".4f"),
            marks.get(point.gain, ""),
        )
        for point in report.points
    ]
    head = ("gain", "loss", "change", "token accuracy", "rise on general text", "KL to the base", "")
    return table("The adapter at other strengths", head, rows)


def answers(report: EvalReport) -> Html | None:
    """Return what base and tuned model said, side by side; the first rows are open."""
    if not report.samples:
        return None
    return joined(folded(sample.row, _answer(sample), is_open=at < 3) for at, sample in enumerate(report.samples))


def _answer(sample: Sample) -> Html:
    pieces = {"prompt": sample.prompt, "expected": sample.expected, "base": sample.base, "tuned": sample.tuned}
    return tag("div", *(_said(name, text) for name, text in pieces.items()), class_="answers")


def _said(name: str, text: str) -> Html:
    whole = text if len(text) <= _LONGEST else f"{cut(text, _LONGEST)} ..."
    return tag("figure", tag("figcaption", name), tag("pre", whole, tabindex="0"), class_=f"said {name}")
