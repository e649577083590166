"""Draws what `lora doctor` found: what is here, then what is missing."""

from rich.table import Table
from rich.text import Text

from lora_cli.console import out, say
from lora_cli.doctor_report import DoctorReport, Finding, Level
from lora_cli.records import gigabytes

_STYLES: dict[Level, str] = {"problem": "bold red", "note": "yellow", "ok": "green"}


def show(report: DoctorReport) -> None:
    """Show a report; the findings come last, where a terminal stands."""
    table = Table(show_header=False, box=None)
    for name, text in _facts(report).items():
        table.add_row(name, Text(text))
    out.print(table)
    out.print()
    for finding in report.findings:
        say(_line(finding), indent=2)


def _line(finding: Finding) -> Text:
    fix = f" -> {finding.fix}" if finding.fix else ""
    return Text(f"{finding.level}: ", style=_STYLES[finding.level]) + Text(f"{finding.text}{fix}", style="default")


def _facts(report: DoctorReport) -> dict[str, str]:
    machine, hub = report.machine, report.hub
    extras = {each.extra: True for each in report.packages if each.extra is not None}
    for each in report.packages:
        if each.extra is not None:
            extras[each.extra] &= each.fits
    known = {
        "versions": ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        "extras": ", ".join(str(name) for name, fits in extras.items() if fits) or "none",
        "system": machine.system,
        "CPU": f"{machine.cpu}; {machine.usable:g} of {machine.processors} processors usable, torch uses "
        f"{machine.threads} thread{'s' * (machine.threads != 1)}",
        "memory": f"{_bytes(machine.free_memory)} free of {_bytes(machine.memory)}",
    }
    for number, gpu in enumerate(report.gpus):
        known[f"GPU {number}"] = (
            f"{gpu.name}: {_bytes(gpu.free)} free of {_bytes(gpu.memory)}, compute capability {gpu.capability}, "
            f"{'' if gpu.bfloat16 else 'no '}bfloat16, {'' if gpu.varlen else 'no '}FlashAttention"
        )
    for place in report.places:
        used = "" if place.used is None else f", {_bytes(place.used)} kept"
        known[place.name] = f"{place.path}: {_bytes(place.free)} free{used}"
    answers = {True: "answers", False: "does not answer", None: "not asked"}[hub.reachable]
    known["hub"] = f"{hub.endpoint}: {answers}; {'a token is here' if hub.token else 'no token'}"
    known["compiler"] = machine.compiler or "none"
    known["limits"] = f"{machine.open_files or 'any number of'} open files; {machine.encoding}"
    if machine.proxies:
        known["proxies"] = ", ".join(machine.proxies)
    return known


def _bytes(count: int | None) -> str:
    return "not known" if count is None else gigabytes(count)
