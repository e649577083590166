"""Hostile artefacts, each given to the commands that touch it: none runs, none leaks, none hangs, memory is bounded."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import conftest

from lora_cli.config import LoraConfig
from torture.artefacts import ARTEFACTS, PASSWORD, SECRET, Artefact, Commands, Materials

SECONDS = 30  # a command may take
MEMORY = 2560  # MiB, of which a template may take 1024 beside what torch and transformers do


def _ordinary(have: Materials, folder: Path) -> Commands:
    """Write the config of a run; return what a user does with it, from the first look to an export."""
    config, run = have.config(have.run.parent), str(have.run)
    commands = [
        ["version"],
        ["check", *config],
        ["train", *config],
        ["train", *config],
        ["eval", run, "--answers", "2"],
    ]
    commands += [["scale", run, "--gain", "0.5", "--output", str(folder / "scaled")]]
    commands += [["merge", run, "--output", str(folder / "merged")]]
    for format in ("peft", "mlx", "ollama"):
        commands += [["export", run, "--format", format, "--output", str(folder / format)]]
    return commands


def _materials(folder: Path) -> tuple[Materials, dict[str, Any]]:
    """Make what artefacts are made from, by the commands a user gives; return it with the report of these."""
    model = conftest.save_base("llama", folder / "model")
    conftest.write_adapter(str(model), folder / "adapter", LoraConfig(rank=4, alpha=8))
    rows = Path(conftest.write_rows(folder / "rows.jsonl", [conftest.conversation(number) for number in range(40)]))
    have = Materials(model, folder / "adapter", folder / "finished" / "out", rows, folder / "canary")
    have.run.parent.mkdir()
    return have, _audited(_ordinary(have, folder), folder)[0]


def _audited(commands: Commands, folder: Path) -> tuple[dict[str, Any], str]:
    """Run commands in a process under an audit hook; return its report and all that it printed."""
    (folder / "commands.json").write_text(json.dumps(commands))
    program = [sys.executable, str(Path(__file__).with_name("audited.py")), str(folder / "commands.json")]
    environment = os.environ | {"LORA_CACHE": str(folder / "cache"), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode:
        raise AssertionError(f"the audited process ended with {done.returncode}: {done.stderr[-500:]}")
    *printed, last = done.stdout.splitlines()
    report: dict[str, Any] = json.loads(last)
    return report, "\n".join(printed) + done.stderr


def _leaks(folder: Path, printed: str) -> Iterator[str]:
    """Iterate over the places where a planted secret came out."""
    for secret in (SECRET, PASSWORD):
        if secret in printed:
            yield f"a secret is printed: ...{printed[max(0, printed.index(secret) - 80) : printed.index(secret)]}"
        for path in folder.rglob("*"):
            written = any(part.startswith(("out", "lora-bug")) for part in path.relative_to(folder).parts)
            if written and path.is_file() and secret.encode() in path.read_bytes():
                yield f"a secret is in {path.relative_to(folder)}"


def try_out(artefacts: Sequence[Artefact], folder: Path) -> dict[str, Any]:
    """Give artefacts to their commands; return the figures, with a short text for each failure."""
    have, ordinary = _materials(folder)
    failures: list[str] = [*ordinary["events"]]
    failures += [f"{done['command']}: {done['code']}" for done in ordinary["commands"] if done["code"]]
    commands: Commands = []
    for number, artefact in enumerate(artefacts):
        (folder / str(number)).mkdir()
        made = artefact.build(folder / str(number), have)
        commands += made
    report, printed = _audited(commands, folder)
    for done in report["commands"]:
        if done["code"] not in (0, 2, 3):
            failures.append(f"exit code {done['code']}: {' '.join(done['command'])[:200]}")
        if done["seconds"] > SECONDS:
            failures.append(f"{done['seconds']} s: {' '.join(done['command'])[:200]}")
    failures += report["events"]
    failures += ["the canary is there"] if have.canary.exists() else []
    failures += [f"{report['largest_mib']} MiB of memory"] if report["largest_mib"] > MEMORY else []
    failures += _leaks(folder, printed)
    slowest = max(done["seconds"] for done in report["commands"])
    return {
        "tried": len(artefacts), "commands": len(commands), "failures": failures, "slowest_seconds": slowest,
        "largest_mib": report["largest_mib"], "ordinary_commands": len(ordinary["commands"]),
        "between_our_processes": ordinary["between_ours"],
    }  # fmt: skip


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Try `count` artefacts (0: all), in an order that follows from the seed."""
    return try_out(random.Random(seed).sample(ARTEFACTS, min(count or len(ARTEFACTS), len(ARTEFACTS))), folder)
