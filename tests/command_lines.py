"""Command lines as documents show them: taken apart as a shell does, and read by the programs they would start."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import typer

from lora_cli import cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
# What stands for something else in commands.
PLACEHOLDERS = {
    "CONFIG": "config.yaml", "RUN": "runs/first", "A": "a", "B": "b", "DIR": "out", "OUT": "out", "PATH": "out",
    "N": "2", "NAME": "peft", "FILE": "heldout.jsonl", "DATA": "heldout.jsonl", "MODEL": "model", "PLACE": "study.log",
    "KEY=VALUE": "lora.rank=4", "configs/NAME.yaml": "configs/quickstart.yaml",
}  # fmt: skip
WRAPPED = {"scripts/bench": "scripts/bench_step.py", "scripts/torture": "scripts/torture.py"}
UNWRAPPED = {"scripts/quickstart", "scripts/test", "scripts/check", "scripts/try_tokenizers", "scripts/_setup.sh"}


def lines_of(block: str) -> Iterator[str]:
    """The command lines of a block, continued ones joined, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


def words_of(line: str) -> list[str]:
    """A command line as a shell passes it on: what stands for something else replaced, what may be left out taken."""
    line = re.sub(r"\$\([^)]*\)|\$\w+", "1", line).replace("...", " ")
    line = re.sub(r"\[([^\]\s]*( [^\]]*)?)\](?=\s|$)", r"\1", line)  # [--trials N]
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
    return [word.split("|")[0] if re.fullmatch(r"[a-z|]+", word) else word for word in words]  # train|measure


def read(words: list[str], monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Have the program that a command starts read its arguments; raises where it does not take them."""
    program, *arguments = words
    match program:
        case "srun":
            read(arguments, monkeypatch, whole)
        case "lora":
            name, *rest = arguments
            try:
                COMMANDS[name].make_context(name, rest)
            except Exception as error:
                kind = type(error).__name__  # of Typer's click or of click itself, by the version
                in_part = kind == "MissingParameter" or (kind == "BadOptionUsage" and words[-1].startswith("--"))
                if whole or not in_part:  # a sentence may speak of one option
                    raise
        case "torchrun":
            found = torch.distributed.run.get_args_parser().parse_args(
                arguments
                if whole or "lora_cli" in arguments
                else [*arguments, "-m", "lora_cli", "train", "config.yaml"]
            )
            assert (found.module, found.training_script) == (True, "lora_cli")
            read(["lora", *found.training_script_args], monkeypatch, whole)
        case "python" if whole or arguments[1:]:
            read_by_script(arguments, monkeypatch)
        case "python":
            assert (ROOT / arguments[0]).is_file(), arguments[0]
        case _ if program in UNWRAPPED or not arguments:
            assert (ROOT / program).is_file(), program
        case _:
            read_by_script([WRAPPED[program], *arguments], monkeypatch)


class Read(Exception):
    """A script has read its arguments."""


def read_by_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start one of scripts/ up to where it has read its arguments."""
    understood = argparse.ArgumentParser.parse_args

    def and_no_further(parser: argparse.ArgumentParser, *given: Any) -> None:
        understood(parser, *given)
        raise Read

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", and_no_further)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        with pytest.raises(Read):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
