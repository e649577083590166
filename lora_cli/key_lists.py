"""Draws what became of the keys of another program's config."""

from collections.abc import Iterable

from lora_cli import console
from lora_cli.conversion import ConversionReport, NotNeeded, NotPossible, Taken, Unsaid, said
from lora_cli.strict_yaml import dump_inline

_WIDEST = 48  # characters of a key and its value, in a column of them


def show(report: ConversionReport) -> None:
    """Show each list, first what is trained in another way without it, and what to type next."""
    quiet = [left for left in report.not_possible if not left.changes_training]
    counts = (
        f"{len(report.taken)} keys taken over, {len(report.not_needed)} not needed here, "
        f"{len(report.not_possible)} not possible here"
    )
    console.say(f"{report.source} is a config of {report.program}; as one of ours it is {report.config}: {counts}.")
    _list("Not possible here, AND WITHOUT IT SOMETHING ELSE IS TRAINED", map(_left, report.other_training))
    _list("Not possible here", map(_left, quiet))
    _list("Taken over", map(_taken, report.taken))
    _list("Left to a default there, which is another one here", map(_unsaid, report.unsaid))
    _list("Not needed here", map(_left, report.not_needed))
    console.show_next((["lora", "check", report.config], "what a run would do"))


def _list(head: str, rows: Iterable[tuple[str, str]]) -> None:
    """Show a list in two columns under its head; nothing where it is empty."""
    listed = list(rows)
    if listed:
        width = min(_WIDEST, max(len(left) for left, _ in listed))
        console.say(f"\n{head}:")
        for left, right in listed:
            console.say(f"  {left.ljust(width)}  {right}", indent=6)


def _taken(one: Taken) -> tuple[str, str]:
    return said(one.key, one.value), f"-> {said(one.ours, one.our_value)}" + (
        f" ({one.differs})" if one.differs else ""
    )


def _unsaid(one: Unsaid) -> tuple[str, str]:
    return _set(one), one.why


def _set(one: Taken | Unsaid) -> str:
    return f"{one.ours}: {dump_inline(one.our_value)}"


def _left(one: NotNeeded | NotPossible) -> tuple[str, str]:
    return said(one.key, one.value), one.why
