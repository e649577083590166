"""A report as one HTML file that needs nothing else: no server, no font, no script from elsewhere.

A content security policy lets the browser run the one script below, known by its hash, and load nothing.
"""

import base64
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_cli import __version__
from lora_cli.markup import Html, Piece, joined, tag
from lora_cli.page import pictures, searches, tables
from lora_cli.records import duration, with_interval
from lora_cli.run_reports import Report, RunReport, SearchReport
from lora_cli.run_words import forgetting_in_words

MARK = '<meta name="generator" content="lora report">'  # by which a file is known as ours
_STYLE, _SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


def html(report: Report) -> str:
    """Return the whole page."""
    names = [run.name for run in report.runs] or [search.name for search in report.searches]
    title = f"{names[0]} - lora" if len(names) == 1 else f"{len(names)} runs - lora"
    head = joined(
        [
            tag("meta", charset="utf-8"),
            Html(MARK),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
            tag("title", title),
            tag("style", Html(_STYLE)),
        ]
    )
    parts = list(_parts(report))
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in parts]
    body = [
        tag("header", tag("h1", *_title(report)), tag("nav", tag("ul", *links), aria_label="Sections")),
        tag("main", *(_section(key, name, inside) for key, name, inside in parts)),
        tag("footer", f"Made by lora {__version__}. x is the optimizer step unless an axis says otherwise."),
        tag("script", Html(_SCRIPT)),
    ]
    whole = tag("html", tag("head", head), tag("body", *body), lang="en")
    return f"<!doctype html>\n{whole.text}\n"


def _policy() -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (_STYLE, _SCRIPT))
    style, script = (f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _title(report: Report) -> Iterator[Piece]:
    if len(report.runs) == 1:
        (run,) = report.runs
        yield run.name
        yield " "
        yield tag("span", run.status, class_=f"status {run.status.split()[0]}")
    else:
        yield f"{len(report.runs)} runs" if report.runs else "A search"


def _section(key: str, name: str, inside: Sequence[Piece]) -> Html:
    return tag("section", tag("h2", name, id=f"{key}-title"), *inside, id=key, aria_labelledby=f"{key}-title")


Section = tuple[str, str, Sequence[Piece]]


def _parts(report: Report) -> Iterator[Section]:
    """Iterate over the sections of a page: key, title, what is inside."""
    if len(report.runs) == 1:
        yield from _of_run(report.runs[0])
    elif report.runs:
        yield from _comparison(report)
    for number, search in enumerate(report.searches):
        yield f"search-{number}", _search_title(search), [searches.search(search)]
    if len(report.runs) == 1:
        yield from _settled(report.runs[0])
    else:
        for number, run in enumerate(report.runs):
            yield f"run-{number}", run.name, list(_whole_run(run))


def _search_title(search: SearchReport) -> str:
    if search.tune is not None:
        return f"Search: {len(search.tune.trials)} trials"
    return "One knob at a time" if search.sensitivity is not None else "Against full fine-tuning"


# --- one run ---


def _of_run(run: RunReport) -> Iterator[Section]:
    yield "summary", "Summary", [*_summary(run)]
    drawn = pictures.of_run(run)
    yield "curves", "Curves", [pictures.grid(drawn) if drawn else tag("p", "No step was taken yet.")]
    yield "evaluation", "Evaluation", [*_evaluations(run)]
    if run.tried_rates:
        yield "rates", "Learning rate", [pictures.grid([pictures.rates(run.tried_rates, run.chosen_rate)])]


def _settled(run: RunReport) -> Iterator[Section]:
    """Iterate over what a run was given: data, config, surroundings."""
    yield "data", "Data", [*_data(run)]
    yield "config", "Config", [tables.settings(run.settings), tables.changes(run.changes)]
    yield "environment", "Environment", [tables.surroundings(run)]


def _whole_run(run: RunReport) -> Iterator[Piece]:
    """Return one of several runs: its summary, and the rest folded."""
    yield from _summary(run)
    for _, name, inside in [*list(_of_run(run))[1:], *_settled(run)]:
        yield tables.folded(name, *inside)


def _summary(run: RunReport) -> Iterator[Piece]:
    yield tag("div", *_tiles(run), class_="tiles")
    yield tag("div", *(tag("p", text) for text in run.summary), class_="summary")
    for kind, title, texts in (("warnings", "Not read", run.warnings), ("notices", "To know", run.notices)):
        if texts:
            yield tag("aside", tag("h3", title), tag("ul", *(tag("li", text) for text in texts)), class_=kind)
    if run.next:
        commands = tag("pre", "\n".join(run.next), tabindex="0")
        yield tag("div", tag("h3", "Next"), commands, class_="next")


def _tiles(run: RunReport) -> Iterator[Html]:
    if run.best is not None:
        change = f"{run.best.loss - run.base.loss:+.4f} from base, step {run.best.step:,}" if run.base else ""
        yield _tile("Validation loss", f"{run.best.loss:.4f}", change)
    test = run.finished.test if run.finished else None
    if test is not None:
        yield _tile("Test loss", f"{test.loss:.4f}", f"{with_interval(test.change, '+.4f')} from base")
    forgetting = run.best.forgetting if run.best else None
    if forgetting is not None and forgetting.rise.value is not None:
        budget = "no budget" if run.budget is None else f"budget {run.budget:g}"
        yield _tile("Forgetting", f"{forgetting.rise.value:+.4f}", f"nats on general text, {budget}")
    of = f"of {run.total_steps:,}" if run.total_steps else run.status
    yield _tile("Steps", f"{run.step:,}", of)
    speed = f"{run.tokens / run.seconds:,.0f} a second with validation" if run.seconds else ""
    yield _tile("Tokens", f"{run.tokens:,}", speed)
    yield _tile("Time", duration(run.seconds), "of training and validation")


def _tile(name: str, value: str, note: str) -> Html:
    pieces = (tag("dt", name), tag("dd", value, class_="value"), tag("dd", note, class_="note"))
    return tag("dl", *pieces, class_="tile")


def _evaluations(run: RunReport) -> Iterator[Piece]:
    command = shlex.join(["lora", "eval", str(run.path)])
    if not run.evaluations:
        yield tag("p", "Not measured beside the base yet: ", tag("code", command), " adds this.")
    for number, found in enumerate(run.evaluations):
        title = f"{found.adapter.name} on {found.data}"
        counted = f"{found.rows:,} rows, {found.targets:,} trained tokens, {found.answers:,} answers"
        parts: list[Piece] = [tables.compared(found.figures, f"{title}: {counted}; 95 % intervals in brackets")]
        if found.tasks:
            parts.append(tables.compared(found.tasks, "Tasks of lm-evaluation-harness"))
        if found.forgetting is not None:
            parts.append(tag("p", f"Forgetting: {forgetting_in_words(found.forgetting)}."))
        if found.scan is not None:
            parts += [pictures.grid([pictures.scan(found.scan)]), tables.scanned(found.scan)]
        if (said := tables.answers(found)) is not None:
            parts += [tag("h3", f"Answers of {title}"), said]
        yield joined(parts) if number == 0 else tables.folded(f"Before that: {title}", *parts)
    if run.evaluations and not any(found.scan for found in run.evaluations):
        scan = tag("code", f"{command} --scan")
        yield tag("p", "What it learns and forgets at other strengths: ", scan, " adds this.", class_="hint")


def _data(run: RunReport) -> Iterator[Piece]:
    if not run.data:
        yield tag("p", "The counts of its rows were not written down when this run began.")
        return
    yield tables.counts(run.data)
    drawn = (pictures.lengths(name, counts) for name, counts in run.data.items())
    yield pictures.grid([each for each in drawn if each is not None])
    yield tables.sources(run.data)


# --- several runs ---


def _comparison(report: Report) -> Iterator[Section]:
    names = [run.name for run in report.runs]
    yield "results", "Results", [tables.results(report.runs)]
    yield "curves", "Curves", [pictures.grid(pictures.of_runs(report.runs))]
    config = tables.differences("Keys of the config that differ", report.settings, names)
    around = tables.differences("What differs around them", report.surroundings, names)
    yield "differences", "Differences", [config, around]
