"""What TAB offers: asked as a shell asks, in a process, by the environment."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import typer
from conftest import write_rows

from lora_cli import cli, compare, completion, export, merged_folder, schema, scoring, update
from lora_cli.config import RunConfig
from lora_cli.formats import gguf_file

PROGRAM = [sys.executable, "-c", "import sys; sys.argv = ['lora']; from lora_cli.cli import main; main()"]
LIMIT = 0.5  # seconds of a processor, in which a shell has its answer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with configs, rows, a run and an adapter."""
    for name in ("first.yaml", "second.yml"):
        (tmp_path / name).touch()
    write_rows(tmp_path / "rows.jsonl", [])
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").touch()
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "adapter_config.json").touch()
    return tmp_path


def ask(place: Path, **environment: str) -> list[str]:
    """The lines that the program answers a shell, which are all that it says."""
    before = os.times()
    done = subprocess.run(
        PROGRAM, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    after = os.times()
    assert done.stderr == ""
    assert after.children_user - before.children_user < 2 * LIMIT  # twice: tests run beside each other
    return [line for line in done.stdout.splitlines() if line]


def in_bash(place: Path, *words: str) -> list[str]:
    """What is offered for the last of some words, as bash cuts them."""
    return ask(place, COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1), _LORA_COMPLETE="complete_bash")


def test_bash_is_offered_keys_values_configs_and_runs(place: Path):
    """Each as far as it is begun; what is the only one is never a part of a word, as bash ends it with a space."""
    assert in_bash(place, "lora", "train", "first.yaml", "lora.r") == ["lora.rank=", "lora.rank=32"]
    assert in_bash(place, "lora", "train", "first.yaml", "train.schedule", "=", "co") == ["cosine", "constant"]
    assert in_bash(place, "lora", "train", "first.yaml", "train.compile", "=") == ["true", "false"]
    assert in_bash(place, "lora", "train", "first.yaml", "seed=1", "lo") == [
        *("lora.method=", "lora.init=", "lora.rank=", "lora.alpha=", "lora.dropout=", "lora.target_modules=")
    ]
    assert in_bash(place, "lora", "train", "") == ["first.yaml", "given/", "runs/", "second.yml"]
    assert in_bash(place, "lora", "eval", "ru") == ["runs/one", "runs/one/"]
    assert in_bash(place, "lora", "export", "given", "--format", "g") == ["gguf", "gguf-lora"]


@pytest.mark.parametrize("words", [("nonsense",), ("train", "x", "=", "=")])
def test_nothing_is_offered_for_nonsense(words: tuple[str, ...], place: Path):
    """And nothing is said either."""
    assert in_bash(place, "lora", *words, "zzz") == []


def test_other_shells_are_told_what_it_means(place: Path):
    """One line for each word, with the schema's description."""
    typed = "lora train first.yaml "
    fish = ask(
        place,
        _LORA_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args",
        _TYPER_COMPLETE_ARGS=typed + "train.",
    )  # fmt: skip
    keys = [line.partition("\t")[0] for line in fish]
    assert [key for key in keys if "=" not in key] == ["train.early_stopping."]
    assert "train.schedule=\tcosine | linear | constant" in fish
    zsh = ask(place, _LORA_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=typed + "lora.method=r")
    assert zsh == ["_arguments '*: :((\"lora.method=rslora\"))'"]
    powershell = ask(
        place,
        _LORA_COMPLETE="complete_powershell",
        _TYPER_COMPLETE_ARGS=typed + "lora.al", _TYPER_COMPLETE_WORD_TO_COMPLETE="lora.al",
    )  # fmt: skip
    assert powershell[0] == "lora.alpha=:::scale of the update, divided by the rank"


def test_the_words_offered_are_those_that_are_taken():
    """Of every option that takes one of a few."""
    taken = {
        ("eval", "metric"): {*get_args(scoring.Metric), compare.LABEL},
        ("export", "format"): {*get_args(export.Format)},
        ("export", "gguf_type"): {*get_args(gguf_file.Kind)},
        ("merge", "dtype"): {*get_args(merged_folder.Dtype)},
        ("merge", "rounding"): {*get_args(merged_folder.Rounding)},
        ("merge", "onto"): {*get_args(merged_folder.Onto)},
        ("merge", "method"): {*get_args(update.Method)},
    }
    commands = typer.main.get_command(cli.app).commands
    for (command, option), known in taken.items():
        (parameter,) = [one for one in commands[command].params if one.name == option]
        assert {item.value for item in parameter.shell_complete(None, "")} == known


def test_every_key_is_offered_with_its_description():
    """Asked section by section, every key of the config that lora init writes."""

    def keys(begun: str) -> list[tuple[str, str]]:
        found = completion._keys(begun)
        return [one for key, what in found for one in (keys(key) if key.endswith(".") else [(key, what)])]

    offered = dict(keys(""))
    assert [key.rstrip("=") for key in offered] == [key for key, _ in schema.rules(RunConfig)]
    assert all(offered.values())
    assert max(map(len, offered.values())) <= 72


def test_a_bash_of_its_own_completes(place: Path):
    """TAB in an interactive bash, with the script that --show-completion prints."""
    program = place / "bin" / "lora"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom lora_cli.cli import main\nmain()\n")
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "TERM": "dumb",
        "INPUTRC": os.devnull,
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",  # who runs the tests need not be a shell
    }
    with (place / "completion.sh").open("w") as script:
        subprocess.run([program, "--show-completion", "bash"], stdout=script, env=environment, check=True)
    process, terminal = pty.fork()
    if not process:
        os.chdir(place)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    try:
        for typed, shown in {
            "source completion.sh; echo rea''dy\n": "ready",
            "lora train fir\t": "first.yaml ",
            "train.sche\t": "train.schedule=",
            "li\t": "linear ",
            "lora.ra\t": "lora.rank=",
        }.items():
            os.write(terminal, typed.encode())
            assert said(terminal, shown), typed
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def said(terminal: int, wanted: str, seconds: float = 20.0) -> bool:
    """Whether a terminal shows a text in time; what it shows before is read too."""
    shown, limit = "", time.monotonic() + seconds
    while wanted not in shown and time.monotonic() < limit:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += (
                os.read(terminal, 4096).decode(errors="replace").replace("\a", "")
            )  # it rings where more is to be typed
    return wanted in shown
