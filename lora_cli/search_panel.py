"""Draws where a search stands while it goes on: its best trials so far, and the one under way."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_cli.console import err
from lora_cli.panel import FEWEST_COLUMNS, FEWEST_ROWS, one_bar
from lora_cli.records import TrialEnded, short
from lora_cli.standing import SearchStanding
from lora_cli.tables import Fitting, last_parts

_SHOWN = 5  # of the trials


class SearchPanel:
    """A search's panel, as large as the console that it is drawn on allows."""

    def __init__(self, standing: SearchStanding) -> None:
        self.standing = standing
        self.note = ""  # the last line, where there is something to say of what is going on

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= FEWEST_COLUMNS and console.height >= FEWEST_ROWS:
            yield Text()
            best = sorted(filter(_is_known, self.standing.ended), key=_loss)[:_SHOWN]
            if best:
                yield _table(best, options.max_width)
            yield Text(_state(self.standing))
        yield one_bar(self.standing.current, options.max_width)
        if self.note:
            yield Text(self.note, "yellow")


def _is_known(one: TrialEnded) -> bool:
    return one.loss is not None and one.loss == one.loss and one.state == "finished"


def _loss(one: TrialEnded) -> tuple[float, float]:
    return one.excess, one.loss if one.loss is not None else float("inf")


def _state(standing: SearchStanding) -> str:
    """Say which trial is under way, and how the others ended."""
    of = f" of {standing.of}" if standing.of else ""
    states = [one.state for one in standing.ended]
    is_over = standing.of is not None and len(states) >= standing.of
    words = ["training the best whole" if is_over else f"trial {len(states) + 1}{of}"]
    words += [f"{states.count(state)} {state}" for state in ("pruned", "diverged") if state in states]
    if known := sorted(filter(_is_known, standing.ended), key=_loss):
        words.append(f"best {known[0].loss:.4f} (trial {known[0].number})")
    return "  ".join(words)


def _table(best: list[TrialEnded], width: int) -> Fitting:
    """Return the best trials; where not all keys have a column, the values share one."""
    keys = list(dict.fromkeys(key for one in best for key in one.values))
    rows = [[str(one.number), f"{one.loss:.4f}", *(short(one.values.get(key)) for key in keys)] for one in best]
    table = Fitting(["trial", "loss", *last_parts(keys)], rows, (0, 1))
    if table.fits(err, width):
        return table
    return Fitting(["trial", "loss", ""], [[*row[:2], " ".join(row[2:])[: width - 18]] for row in rows], (0, 1))
