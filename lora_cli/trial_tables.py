"""Draws what a search came to."""

from rich.markup import escape
from rich.table import Table

from lora_cli.console import out, short
from lora_cli.records import TrialEnded
from lora_cli.reports import TuneReport


def show_tune(report: TuneReport) -> None:
    """Show the trials, the best first, and what to do with the best."""
    keys = list(dict.fromkeys(key for one in report.trials for key in one.values))
    both = any(one.forgetting is not None for one in report.trials)
    table = Table("trial", *keys, "loss", *(["rise on general text"] if both else []), "steps", "", box=None)
    for one in sorted(report.trials, key=_order):
        note = "" if one.state == "finished" else one.state
        if one.number == report.best:
            note = "the best"
        elif one.number in report.front:
            note = "not beaten in both"
        elif one.excess > 0:
            note = "over the budget"
        cells = [short(one.values.get(key)) for key in keys]
        loss = "-" if one.loss is None else f"{one.loss:.4f}"
        rise = ["-" if one.forgetting is None else f"{one.forgetting:+.4f}"] if both else []
        table.add_row(str(one.number), *map(escape, cells), loss, *rise, f"{one.steps}/{one.of_steps}", note)
    out.print(table)
    for line in _what_next(report):
        out.print(line, markup=False, soft_wrap=True)


def _order(one: TrialEnded) -> tuple[bool, float, float]:
    return one.state != "finished", one.excess, one.loss if one.loss is not None else float("inf")


def _what_next(report: TuneReport) -> list[str]:
    if report.running:
        return [f"{report.running} trials are under way in other processes; the last to end trains the best whole."]
    if report.final is None:
        return ["No trial was finished." if report.best is None else "The best was not trained whole here."]
    final = report.final
    known = (("base", final.base_loss), ("best", final.best_loss))
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in known if loss is not None)
    return [
        f"Trained whole: validation loss {losses}.",
        f"Config: {report.config}. Adapter: {final.adapter}. Report: {report.saved}.",
        f"Next: lora eval {final.adapter.parent}",
    ]
