"""Draws what searches came to: trials, and what each knob does."""

from lora_cli import tables
from lora_cli.console import say, show_next
from lora_cli.records import gigabytes, short, with_interval
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport, change_in_words


def show(report: TuneReport | SensitivityReport | AgainstFullReport) -> None:
    """Show what `lora tune` came to."""
    match report:
        case TuneReport():
            _tune(report)
        case SensitivityReport():
            _sensitivity(report)
        case AgainstFullReport():
            _against_full(report)


def _tune(report: TuneReport) -> None:
    """Show the trials, the best first, and what to do with the best."""
    keys = list(dict.fromkeys(key for one in report.trials for key in one.values))
    both = any(one.forgetting is not None for one in report.trials)
    rise, rows = ["rise"] if both else [], list[list[str]]()
    for one in report.in_order():
        cells = [short(one.values.get(key)) for key in keys]
        loss = "-" if one.loss is None else f"{one.loss:.4f}"
        forgot = ["-" if one.forgetting is None else f"{one.forgetting:+.4f}"] if both else []
        rows.append([str(one.number), *cells, loss, *forgot, f"{one.steps}/{one.of_steps}", report.note(one)])
    tables.show(["trial", *tables.last_parts(keys), "loss", *rise, "steps", ""], rows)
    if both:
        say("The rise is that of the loss on general text.")
    for line in _came_to(report):
        say(line)
    if report.final is not None:
        run = report.final.adapter.parent
        show_next(
            (["lora", "eval", run], "the best beside the base, with intervals"),
            (["lora", "chat", run], "talk to it"),
            (["lora", "report", run], "curves and figures on one page"),
        )


def _came_to(report: TuneReport) -> list[str]:
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
    ]


def _sensitivity(report: SensitivityReport) -> None:
    """Show what half and twice of each knob change, and what another seed alone may."""
    say(report.around())
    rows = list[list[str]]()
    for knob in report.knobs:
        cells = list[str]()
        for side in knob.sides():
            cells += ["-", "-"] if side is None else [short(side[0]), change_in_words(side[1])]
        rows.append([knob.key, short(knob.value), *cells, knob.verdict()])
    tables.show(["key", "value", "half", "change", "twice", "change", "more than a seed"], rows)
    if report.left:
        say(f"At 0, so neither halved nor doubled: {', '.join(report.left)}.")
    say(f"Plot: {report.plot}. Report: {report.saved}.")


def _against_full(report: AgainstFullReport) -> None:
    """Show LoRA beside full fine-tuning, and what it reaches of that with how much."""
    say(f"{report.data}: {report.targets:,} targets; 95 % intervals in brackets")
    rows = list[list[str]]()
    for side in (report.lora, report.full):
        loss, change = with_interval(side.loss, ".4f"), with_interval(side.change, "+.4f")
        cells = [side.method, f"{side.learning_rate:.2g}", loss, change, f"{side.parameters:,}"]
        rows.append([*cells, gigabytes(side.peak_memory), f"{side.seconds:.2f}"])
    tables.show(["", "rate", "loss", "change from base", "parameters", "peak memory", "s/step"], rows)
    parameters, memory = (
        f"{getattr(report.lora, name) / getattr(report.full, name):.1%}" for name in ("parameters", "peak_memory")
    )
    reached = (
        "LoRA was trained"
        if report.share is None
        else (f"LoRA reaches {with_interval(report.share, '.1%')} of the full run's gain")
    )
    lines = [
        f"{reached} with {parameters} of the parameters and {memory} of the memory.",
        f"Its loss less that of full: {with_interval(report.difference, '+.4f')}. Report: {report.saved}.",
    ]
    if report.share is None:
        lines.insert(0, "The full run took nothing off the base's loss, so there is no share of it.")
    for line in lines:
        say(line)
