"""Every bad input of the catalogue in tests/bad/ is refused with its place and a way out, and nothing is written.

The catalogue is a file an area; how a case is written down stands at the top of tests/bad_cases.py.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_cases import AREAS, FOLDER, Case, cases, contents, make_good, prepare, problems_of
from conftest import Invoke


@pytest.fixture
def good(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Callable[[str], str],
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder in which everything is right, made once."""
    folder = tmp_path_factory.getbasetemp() / "good"
    if not folder.exists():
        folder.mkdir()
        with monkeypatch.context() as here:
            here.chdir(folder)
            make_good(folder, model_folder("llama"), invoke)
    return folder


@pytest.mark.parametrize("case", [case for area in AREAS for case in cases(area)])
def test_a_bad_input_is_explained_and_leaves_nothing(
    case: Case,
    invoke: Invoke,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The exit code, one paragraph with the place, what was found, a way out and the state; every file as it was."""
    folder, cache = tmp_path / "here", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORA_CACHE", str(cache))
    prepare(case, folder, good)
    before = list(contents(folder, cache))
    command = shlex.split(case.get("command", "train config.yaml"))
    code, out, err = invoke(*command)

    assert problems_of(case, code, out, err) == [], err
    assert list(contents(folder, cache)) == before
    if case.get("as json"):
        _, out, again = invoke(*command, "--json")
        error = json.loads(out)["error"]
        assert (error["exit_code"], again) == (code, err)
        assert err == "error: " + "\n".join([*error["problems"], error["state"]]) + "\n"


SLOW = {"torch", "transformers", "datasets", "pyarrow"}


def test_configs_and_rows_are_refused_before_torch_is_imported(tmp_path: Path):
    """All cases of these two areas in one fresh process, but those that need a tokenizer or the hub.

    Only what reads rows, pyarrow, is imported, and for a wrong config not even that.
    """
    folders, expected = [], []
    for area, imported in (("config", []), ("data", ["pyarrow"])):
        for number, parameter in enumerate(cases(area)):
            (case,) = parameter.values
            if not case.get("late") and "command" not in case:
                folders.append(tmp_path / f"{area}{number}")
                folders[-1].mkdir()
                expected.append(f"2 {imported}")
                prepare(case, folders[-1], None)
    program = (
        "import os, sys\n"
        "from lora_cli.cli import main\n"
        "sys.argv = ['lora', 'train', 'config.yaml']\n"
        "for folder in sys.stdin.read().split():\n"
        "    os.chdir(folder)\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        f"        print(end.code, sorted({SLOW} & set(sys.modules)))\n"
    )
    given = "\n".join(map(str, folders))
    done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, text=True, check=False)

    assert len(folders) > 150
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


def test_the_catalogue_is_whole():
    """It has the six areas and at least 130 cases, each a different one."""
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(AREAS)
    found = [str(parameter.values[0]) for area in AREAS for parameter in cases(area)]
    assert len(found) == len(set(found)) >= 130


def test_a_name_that_is_nearly_right_is_met_with_what_lies_beside_it(
    invoke: Invoke, make_config: Callable[..., Path], undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Rows, a model and a run; what a hub would be asked for too, in one line, and no hidden file is offered."""
    config = make_config()
    (tmp_path / ".rows.jsonl").touch()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    misspelt = invoke("check", config, "data.train=rows.jsnl")
    model = invoke("check", config, "model=models/Smol")
    run = invoke("eval", undisturbed.with_name("ran"), "--quiet")
    init = invoke("init", "new.yaml", "--data", "rosw.jsonl", "--model", "models/Smol", "--yes")

    near = f"Did you mean {Path('models', 'SmolLM2-135M-Instruct')}?"
    assert (misspelt[0], model[0], run[0], init[0]) == (2, 3, 2, 0)
    assert "rows.jsnl: no such file. Did you mean rows.jsonl?\n" in misspelt[2]
    assert near in model[2]
    assert "\\n" not in model[2]
    assert f"Did you mean {undisturbed}?" in run[2]
    assert near in init[2]
    assert "Did you mean rows.jsonl?" in init[2]
