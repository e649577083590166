"""What commands print with --json, from the records they report: docs/json.md and docs/json-schema.json.

A key's meaning is the comment behind its field. `scripts/make_reference.py` writes the pages.
"""

import ast
import functools
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from lora_cli import (
    chat_reports,
    conversion,
    doctor_report,
    init_report,
    metrics,
    records,
    reports,
    run_reports,
    search_reports,
)

BAR = r"\|"  # within a cell of a table

# What each command prints with --json: one of these records.
SHAPES: Mapping[str, Sequence[type]] = {
    "init": (init_report.InitReport, init_report.RecipeList, conversion.ConversionReport),
    "check": (reports.CheckReport,),
    "train": (records.Finished,),
    "tune": (search_reports.TuneReport, search_reports.SensitivityReport, search_reports.AgainstFullReport),
    "eval": (reports.EvalReport,),
    "scale": (reports.ScaleReport,),
    "merge": (reports.MergeReport, reports.CombineReport),
    "export": (reports.GgufReport, reports.ExportReport),
    "chat": (chat_reports.ChatReport,),
    "serve": (chat_reports.ServeReport,),
    "report": (run_reports.Report,),
    "doctor": (doctor_report.DoctorReport,),
    "version": (reports.VersionReport,),
}
# When a command prints which, where it has several.
WHEN = {
    init_report.InitReport: "a config, or a recipe",
    init_report.RecipeList: "`--list`",
    conversion.ConversionReport: "`--from`",
    search_reports.TuneReport: "a search",
    search_reports.SensitivityReport: "`--one-at-a-time`",
    search_reports.AgainstFullReport: "`--against-full`",
    reports.MergeReport: "a merged model",
    reports.CombineReport: "`--adapter`",
    reports.GgufReport: "`gguf`, `gguf-lora`, `ollama`",
    reports.ExportReport: "`peft`, `mlx`, `onnx`",
}
MEASURED = (records.StepDone, records.Evaluated)  # the lines of metrics.jsonl


# --- meanings ---


@functools.cache
def comments(module: str) -> Mapping[int, str]:
    """The comment on each line of a module."""
    source = io.StringIO(inspect.getsource(sys.modules[module]))
    return {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(source.readline)
        if token.type == tokenize.COMMENT
    }


@functools.cache
def meanings(record: type) -> Mapping[str, str]:
    """What each field of a class means: the comment behind it. Raises ValueError where one has none."""
    module = ast.parse(inspect.getsource(sys.modules[record.__module__]))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == record.__name__)
    behind = comments(record.__module__)
    said = {
        node.target.id: behind.get(node.end_lineno or 0, "")
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    if silent := [name for name, text in said.items() if not text]:
        raise ValueError(f"{record.__name__}: say in a comment behind it what is meant by: {', '.join(silent)}")
    return said


def first_paragraph(thing: type) -> str:
    """The first sentence or paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |"
    yield ""


# --- what commands print ---


JSON_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    NoneType: "null",
    Any: "any value",
}


def in_words(hint: Any) -> str:
    """A field's type as JSON has it."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(one) for one in arguments)
    if get_origin(hint) is Literal:
        return " or ".join(f"`{json.dumps(one)}`" for one in arguments)
    if arguments and issubclass(get_origin(hint) or object, Mapping):
        return f"object of {in_words(arguments[1])}"
    if arguments:
        return f"list of {in_words(arguments[0])}"
    if isinstance(hint, type) and is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return JSON_NAMES[hint]


def fields_of(record: type) -> Iterator[str]:
    """The table of a record's fields."""
    hints = get_type_hints(record)
    said = meanings(record)
    yield from table(
        ("key", "type", "meaning"),
        ((f"`{field.name}`", in_words(hints[field.name]), said[field.name]) for field in fields(record)),
    )


def records_in(hint: Any) -> Iterator[type]:
    """The records that a type holds, in the order in which they are met."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
        for inner in get_type_hints(hint).values():
            yield from records_in(inner)
    for inner in get_args(hint):
        yield from records_in(inner)


JSON_HEAD = """# What commands print with `--json`

Written by `scripts/make_reference.py` from the records that the commands report; `tests/test_json_shapes.py` holds
every command to it. [json-schema.json](json-schema.json) has the same as JSON Schema: in `$defs` one definition for
each command, by its name, and one for each record.

With `--json` a command prints one object on stdout and nothing else there; progress and notices go to stderr. All keys
are always there; what was not measured is `null`. Numbers are not rounded, paths are as they were given, losses are in
nats a token. A command that fails prints [`{"error": ...}`](#errorreport) in its place, says the same in words on
stderr, and ends with the exit code in it. A command line that cannot be read (an option that does not exist) ends with
2 and is answered on stderr alone.
"""


def json_page() -> str:
    """docs/json.md."""
    lines, tops = [JSON_HEAD], [record for shapes in SHAPES.values() for record in shapes]
    said = {record: f"[lora {command}](#lora-{command})" for command, shapes in SHAPES.items() for record in shapes}
    said |= dict.fromkeys(MEASURED, "[metrics.jsonl](#metricsjsonl)")
    for command, shapes in SHAPES.items():
        lines += [f"## lora {command}", ""]
        for record in shapes:
            when = f"With {WHEN[record]}, `{record.__name__}`" if len(shapes) > 1 else f"`{record.__name__}`"
            lines += [f"{when}: {first_paragraph(record)}", "", *fields_of(record)]
    lines += ["## metrics.jsonl", "", "A line of a run's `metrics.jsonl` has `event` and what that event measured.", ""]
    for record in MEASURED:
        name = records.event_name(record.__new__(record))
        lines += [f'`"event": "{name}"`: {first_paragraph(record)}', "", *fields_of(record)]
    lines += ["As a flat table (`metrics` in [python.md](python.md)) its columns are:", ""]
    lines += [", ".join(f"`{column}`" for column in metrics.COLUMNS) + ".", "", "## Records", ""]
    inner = {one for top in tops for hint in get_type_hints(top).values() for one in records_in(hint)}
    for record in dict.fromkeys(one for top in (*tops, *MEASURED, reports.ErrorReport) for one in records_in(top)):
        if record not in said:
            lines += [f"### {record.__name__}", "", first_paragraph(record), "", *fields_of(record)]
        elif record in inner:
            lines += [f"### {record.__name__}", "", f"As {said[record]} has it.", ""]
    return "\n".join(lines).rstrip() + "\n"


def json_schema() -> str:
    """docs/json-schema.json."""
    tops = [*dict.fromkeys(record for shapes in SHAPES.values() for record in shapes), *MEASURED, reports.ErrorReport]
    _, whole = TypeAdapter.json_schemas([(top, "serialization", TypeAdapter(top)) for top in tops])
    definitions = whole["$defs"]
    for record in dict.fromkeys(one for top in tops for one in records_in(top)):
        definition = definitions[record.__name__]
        definition |= {"description": first_paragraph(record), "additionalProperties": False}
        definition["required"] = list(definition["properties"])
        for name, text in meanings(record).items():
            own = {
                key: value for key, value in definition["properties"][name].items() if key not in ("title", "default")
            }
            definition["properties"][name] = own | {"description": text}
    for command, shapes in SHAPES.items():
        references = [{"$ref": f"#/$defs/{record.__name__}"} for record in shapes]
        definitions[command] = references[0] if len(references) == 1 else {"anyOf": references}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "What lora prints with --json"}
    return json.dumps(head | {"$defs": dict(sorted(definitions.items()))}, indent=1, ensure_ascii=False) + "\n"
