"""Draws what `lora init` saw and decided, what to look out for, and what to type next."""

import shlex
from collections.abc import Iterator

from lora_cli import tables
from lora_cli.console import message, say, show_next
from lora_cli.init_report import DataFacts, InitReport, MachineFacts, ModelFacts, RecipeList
from lora_cli.records import gigabytes
from lora_cli.redact import redact
from lora_cli.strict_yaml import dump_inline


def show(report: InitReport) -> None:
    """Show what a config rests on: facts, decisions, notes, and the next commands."""
    for line in _facts(report):
        say(line, indent=2)
    if report.decisions:
        rows = [(each.key, dump_inline(each.value), each.reason) for each in report.decisions]
        tables.show(("key", "value", "why"), rows)
    for warning in report.warnings:
        message(f"note: {warning}")
    what = (
        f"the recipe {report.recipe}" if report.recipe else f"{len(report.decisions)} keys decided, the rest defaults"
    )
    say(f"Wrote {report.config} ({what}).")
    words = ("what a run would do", "then run it")
    show_next(*((shlex.split(command), words) for command, words in zip(report.next, words, strict=True)))


def show_recipes(listed: RecipeList) -> None:
    """Show each recipe's name and what it is for."""
    widest = max(map(len, listed.recipes))
    for name, what in listed.recipes.items():
        say(f"{name:<{widest}}  {what}", indent=widest + 2)


def _facts(report: InitReport) -> Iterator[str]:
    seen = report.seen
    if seen.data is not None:
        yield f"data: {_of_data(seen.data)}"
    if seen.model is not None:
        yield f"model: {_of_model(seen.model)}"
    if seen.machine is not None:
        yield f"machine: {_of_machine(seen.machine)}"


def _of_data(data: DataFacts) -> str:
    formats = redact(", ".join(data.formats))
    if data.counts is None:
        return f"{data.rows:,} rows ({formats}), the longest of {data.longest:,} characters"
    median, longest, answers = data.counts.length_percentiles[0], data.longest, data.counts.target_percentiles
    return (
        f"{data.rows:,} rows ({formats}), half of them up to {median:,} tokens, the longest {longest:,}; answers of "
        f"{answers[0]:,} tokens (median), at most {answers[-1]:,}"
    )


def _of_model(model: ModelFacts) -> str:
    template = "a chat template" if model.chat_template else "no chat template"
    positions = f"{model.positions:,} positions" if model.positions else "any length"
    return f"{model.model_type}, {model.parameters / 1e6:,.1f} M parameters, {positions}, {template}"


def _of_machine(machine: MachineFacts) -> str:
    device = "CPU" if machine.device == "cpu" else f"{machine.devices} x {machine.device}"
    free = "" if machine.free is None else f", {gigabytes(machine.free)} free"
    needed = f", about {gigabytes(machine.fits[-1].total)} needed" if machine.fits else ""
    return f"{device}, {machine.processors} processor{'s' * (machine.processors != 1)}{free}{needed}"
