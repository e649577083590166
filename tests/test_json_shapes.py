"""What commands print with --json is what docs/json.md says of it: no key more, none less, of the types said there."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import DROPOUT, Invoke, conversation, write_config, write_rows
from pydantic import ValidationError
from shapes import SHAPES, fields_of, make_reference, require_shape

from lora_cli import cli, metrics
from lora_cli.chat_reports import ServeReport
from lora_cli.conversion import ConversionReport
from lora_cli.init_report import InitReport, RecipeList
from lora_cli.records import Evaluated, Probed, StepDone
from lora_cli.reports import CombineReport, ErrorReport, EvalReport, ExportReport, GgufReport, MergeReport
from lora_cli.run_dir import RunDir
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport

SMALL = ("data.validation=8", "train.max_steps=2", "eval.per_epoch=1", "save.per_epoch=1", "tune.budget=1")


@pytest.fixture(scope="module")
def folder(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Path:
    """A finished run and a copy of it, a model, configs of ours and of another program, and general text."""
    folder = tmp_path_factory.mktemp("shapes")
    for source, name in ((undisturbed, "run"), (undisturbed, "again"), (model_folder("llama"), "model")):
        shutil.copytree(source, folder / name)
    theirs = (Path(__file__).with_name("peers") / "axolotl-lora-1b.yaml").read_text(encoding="utf-8")
    (folder / "theirs.yaml").write_text(f"{theirs}\nunknown: [.nan, -.inf, 2026-01-31]\n", encoding="utf-8")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    write_config(folder, model_folder("llama"), rows, DROPOUT | {"output_dir": str(folder / "new")})
    (folder / "general.txt").write_text("The sky is blue. Red is a colour. " * 60)
    return folder


# What is typed in that folder, and which of its command's records it prints, where it has several. Dearer ones are held
# to their shapes where they are run: test_sensitivity.py, test_against_full.py, merge --speed in test_cli.py, and serve
# in test_serve.py.
COMMANDS: list[tuple[str, Any]] = [
    ("init train.yaml", InitReport),
    ("init seen.yaml --model model --data rows.jsonl", InitReport),
    ("init recipe.yaml --recipe search", InitReport),
    ("init --list", RecipeList),
    ("init taken.yaml --from theirs.yaml", ConversionReport),
    ("check config.yaml", None),
    ("train config.yaml train.max_steps=2 data.test=4", None),
    ("eval run --answers 4", None),
    ("eval run --scan --general general.txt --metric label --metric chrf", None),
    ("scale run --gain 0.5 --output half", None),
    ("scale run --budget 9 --general general.txt --output within", None),
    ("merge run --output merged", MergeReport),
    ("merge run half --output both --adapter", CombineReport),
    ("export run --output peft", ExportReport),
    ("export run --format mlx --output mlx", ExportReport),
    ("export run --format gguf-lora --output lora.gguf", GgufReport),
    ("export run --format gguf --output model.gguf", GgufReport),
    (f"tune config.yaml --trials 2 output_dir=search {' '.join(SMALL)}", TuneReport),
    ("chat run --prompt Red? --max-new-tokens 4", None),
    ("report run", None),
    ("report run again --metrics table.csv", None),
    ("report search-tune", None),
    ("doctor", None),
    ("doctor --no-test", None),
    ("version", None),
]


@pytest.mark.parametrize(("line", "record"), COMMANDS, ids=[line.partition(" output_dir")[0] for line, _ in COMMANDS])
def test_what_a_command_prints_has_its_shape(
    line: str, record: Any, folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
):
    """One object on stdout, strictly of the documented type."""
    monkeypatch.chdir(folder)
    command, *arguments = line.split()
    code, out, err = invoke(command, *arguments, "--json")

    assert (code, out.count("\n")) == (0, 1), err
    shapes = SHAPES[command]
    assert record in (shapes if len(shapes) > 1 else (None,))
    require_shape(record or shapes[0], out)


def test_every_command_has_a_shape_and_every_shape_was_seen():
    """A command of the program that docs/json.md does not know fails here, as does one that nothing above runs."""
    commands = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    documented = {(command, record) for command, shapes in SHAPES.items() for record in shapes}
    seen = {(line.split()[0], record or SHAPES[line.split()[0]][0]) for line, record in COMMANDS}

    assert commands == set(SHAPES)
    assert documented - seen == {
        ("tune", SensitivityReport),
        ("tune", AgainstFullReport),
        ("serve", ServeReport),
    }


def test_a_failure_is_said_on_stdout_too(folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """The same sentences as on stderr, the exit code, and what state things are in; a bug has its log there."""
    monkeypatch.chdir(folder)
    code, out, err = invoke("check", "config.yaml", "lora.rank=0", "train.lr=1", "--json")
    error = require_shape(ErrorReport, out).error
    assert (error.exit_code, len(error.problems)) == (code, 2) == (2, 2)
    assert all(problem in err.replace("\n", " ") for problem in (*error.problems, error.state))

    monkeypatch.setattr(cli.config_commands.config_file, "load", lambda *_: 1 / 0)
    code, out, _ = invoke("check", "config.yaml", "--json")
    error = require_shape(ErrorReport, out).error
    log = Path(error.state.split("traceback is in ")[1].split(";")[0])
    assert (code, error.exit_code, "ZeroDivisionError" in error.problems[0]) == (1, 1, True)
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_lines_of_metrics_have_their_shape(undisturbed: Path):
    """Each line is its record and the event's name."""
    records = metrics.read(RunDir(undisturbed))
    kinds = {"step": StepDone, "evaluated": Evaluated}

    assert {record["event"] for record in records} == set(kinds)
    for record in records:
        require_shape(kinds[record.pop("event")], json.dumps(record))


def test_a_shape_is_strict():
    """A key more, a key less, a value of another type, and a number that JSON does not have are each refused."""
    whole = {"lora": "1.0", "torch": "2.9", "transformers": "4.57"}
    (shape,) = SHAPES["version"]
    require_shape(shape, json.dumps(whole))
    for wrong in (whole | {"more": 1}, {}, whole | {"lora": 1}):
        with pytest.raises((AssertionError, ValidationError)):
            require_shape(shape, json.dumps(wrong))
    with pytest.raises(ValueError, match="Infinity is no JSON"):
        require_shape(Probed, json.dumps({"rate": math.inf, "loss": None, "steps": 1}))


def test_the_references_are_what_the_code_says(capsys: pytest.CaptureFixture[str]):
    """docs/config.md, docs/json.md and docs/json-schema.json are those that scripts/make_reference.py writes."""
    assert make_reference.main(["--check"]) == 0, capsys.readouterr().err


def test_the_json_schema_says_the_same_as_the_tables(folder: Path):
    """Each key of a table is a required property with the same meaning, and no other key is allowed."""
    schema = json.loads((make_reference.DOCS / "json-schema.json").read_text(encoding="utf-8"))["$defs"]
    for record in (EvalReport, MergeReport, StepDone):
        definition = schema[record.__name__]
        rows = [line.split(" | ") for line in fields_of(record)][2:-1]

        assert [row[0].strip("| `") for row in rows] == definition["required"] == list(definition["properties"])
        assert [row[-1].removesuffix(" |") for row in rows] == [
            one["description"].replace("|", r"\|") for one in definition["properties"].values()
        ]
        assert definition["additionalProperties"] is False
    assert schema["merge"] == {"anyOf": [{"$ref": "#/$defs/MergeReport"}, {"$ref": "#/$defs/CombineReport"}]}
