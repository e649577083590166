"""Draws where a run stands while it goes on: progress, the curve of its losses, and the figures that decide."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lora_cli.curve import Series, plot
from lora_cli.memory_use import memory_use
from lora_cli.records import Evaluated, duration, gigabytes
from lora_cli.standing import Standing

FEWEST_COLUMNS, FEWEST_ROWS = 50, 20  # below, a bar is all
_TWO_COLUMNS = 100  # from here on the figures stand beside the curve
_WIDEST = 120
_SHORTEST_BAR = 6
_FACTS = 52  # columns that the figures take beside the curve
_MARK = {False: "●", True: "o"}  # of a validation, by whether there is only ASCII


class RunPanel:
    """A run's panel, as large as the console that it is drawn on allows."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.note = ""  # the last line, where there is something to say of what is going on

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < FEWEST_COLUMNS or console.height < FEWEST_ROWS:
            yield one_bar(self.standing, options.max_width)
            if self.note:
                yield Text(self.note, "yellow")
            return
        width = min(options.max_width, _WIDEST)
        facts = Table.grid(Column(style="dim", no_wrap=True), Column(), padding=(0, 2, 0, 0))
        rows = list(_facts(self.standing))
        for name, shown in rows:
            facts.add_row(name, shown)
        yield Text()
        yield from _progress(self.standing, width)
        if width >= _TWO_COLUMNS:
            height = min(12, max(len(rows) + 1, console.height - 8))
            both = Table.grid(Column(width=width - _FACTS), Column(width=_FACTS - 2), padding=(0, 2, 0, 0))
            both.add_row(curve(self.standing, width - _FACTS, height, options.ascii_only), facts)
            yield both
        else:
            height = min(10, console.height - len(rows) - 5)
            yield Group(curve(self.standing, width, height, options.ascii_only), facts)
        if self.note:
            yield Text(self.note, "yellow")


def one_bar(standing: Standing, width: int) -> RenderableType:
    """Return where a run stands in one line, with as many of its figures as fit."""
    head, facts = f"step {standing.at}/{standing.total}", list[str]()
    facts += [f"loss {standing.loss:.4f}"] if standing.loss is not None else []
    facts += [f"val {standing.evaluated.loss:.4f}"] if standing.evaluated else []
    facts += [f"{duration(standing.left)} left"] if standing.left is not None else []
    facts += [f"{standing.speed:,.0f} tok/s"] if standing.speed else []
    while facts and (room := width - len(f"{head}  {'  '.join(facts)}")) < _SHORTEST_BAR:
        facts.pop()
    grid = Table.grid(padding=(0, 1, 0, 0))
    bar = ProgressBar(standing.total or 1, standing.at, width=min(24, room) if facts else _SHORTEST_BAR)
    grid.add_row(head, bar, Text("  ".join(facts)))
    return grid


def curve(standing: Standing, width: int, height: int, ascii: bool) -> Text:
    """Return the smoothed training loss as a line and validation losses as marks, with what is which below."""
    mark = _MARK[ascii]
    series = [Series(standing.smooth), Series(standing.validation, mark)]
    key = f"{'- ' if ascii else '⠤⠒ '}training loss, smoothed   {mark} validation loss"
    text = Text("\n".join([*plot(series, width - 1, height - 1, ascii, ("step", ""), ",.0f"), key]), no_wrap=True)
    text.highlight_regex(r"[\u2801-\u28ff]+", "cyan")
    text.highlight_words([_MARK[False]], "bold yellow")
    return text


def _progress(standing: Standing, width: int) -> Iterator[RenderableType]:
    """Yield a bar, and in words how far the run is."""
    share = standing.at / standing.total if standing.total else 0.0
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(ProgressBar(standing.total or 1, standing.at, width=width - 6), f"{share:4.0%}")
    yield grid
    epoch = f"{standing.step.epoch:.2f}" if standing.step else "0"
    a_pass = standing.started.steps_per_epoch if standing.started else 0
    words = [f"step {standing.at}/{standing.total}", f"epoch {epoch} of {standing.total / (a_pass or 1):.2f}"]
    words.append(f"{duration(standing.elapsed)} elapsed")
    words += [f"{duration(standing.left)} left"] if standing.left is not None else []
    yield Text("  ".join(words))


def _facts(standing: Standing) -> Iterator[tuple[str, RenderableType]]:
    """Yield the figures that are known, with their names."""
    if standing.step is not None:
        kl = f"  KL to the base {standing.step.kl:.4f}" if standing.step.kl is not None else ""
        loss = "not finite" if standing.loss is None else f"{standing.loss:.4f}"
        yield "training loss", f"{loss}{kl}"
    if standing.evaluated is not None:
        yield (
            "validation",
            f"{standing.evaluated.loss:.4f} at step {standing.evaluated.step}, "
            f"{standing.evaluated.token_accuracy:.1%} right",
        )
        yield "best", _best(standing)
        left = standing.evaluated.patience_left
        if left is not None and standing.started is not None:
            spent = "yellow" if left < (standing.started.patience or left) else ""
            yield "patience left", Text(f"{left} of {standing.started.patience}", spent)
        if standing.evaluated.forgetting is not None and standing.evaluated.step:
            yield "forgetting", _forgetting(standing, standing.evaluated)
    elif standing.step is None and standing.started is not None and standing.started.validation is not None:
        yield "validation", "of the base, being measured"
    if standing.step is not None:
        yield "learning rate", f"{standing.step.learning_rate:.2e}"
    if standing.speed is not None:
        yield "speed", f"{standing.speed:,.0f} tokens/s"
    used = memory_use()
    known = [gigabytes(used.now)] if used.now is not None else []
    known += [f"peak {gigabytes(used.peak)}"] if used.peak is not None else []
    yield "memory", f"{', '.join(known) or 'not known'} ({used.place})"


def _best(standing: Standing) -> Text:
    base = "" if standing.base is None else f", base {standing.base.loss:.4f}"
    if standing.best is None:
        return Text(f"none yet{base}")
    is_better = standing.base is None or standing.best.loss < standing.base.loss
    return Text(f"{standing.best.loss:.4f} at step {standing.best.step}{base}", "green" if is_better else "yellow")


def _forgetting(standing: Standing, last: Evaluated) -> RenderableType:
    """Return the rise of the loss on general text; with a budget, how much of that it takes as a bar too."""
    assert last.forgetting is not None, "asked for by the caller"
    rise, budget = last.forgetting.rise.value, standing.started.forgetting_budget if standing.started else None
    if rise is None:
        return Text("not known")
    if budget is None:
        return Text(f"{rise:+.4f} on general text")
    style = "red" if rise > budget else "green"
    words = f"{rise:+.4f} of {budget:g}{', over' if rise > budget else ''} "
    grid = Table.grid()
    grid.add_row(Text(words, style), ProgressBar(budget or 1, min(max(rise, 0.0), budget), 12, complete_style=style))
    return grid
