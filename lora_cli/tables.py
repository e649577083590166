"""Tables that stay readable where the terminal is narrow: a row that does not fit becomes a block of its own."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from lora_cli.console import out

STYLES = {"better": "green", "worse": "bold red", "yes": "green", "no": "red", "the best": "bold green"}


class Fitting:
    """A table of text; where it is too wide each row is a block, its first cell above the others with their heads."""

    def __init__(self, heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """`numbers` are columns that are aligned on the right."""
        self.heads, self.rows, self.numbers = heads, rows, numbers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
            yield table
            return
        widest = max(map(len, self.heads[1:]), default=0)
        for row in self.rows:
            yield _cell(row[0], "bold")
            block = Table(Column(style="dim", min_width=widest), Column(), box=None, show_header=False)
            for head, cell in zip(self.heads[1:], row[1:], strict=True):
                if cell:
                    block.add_row(f" {head}", _cell(cell))
            yield block

    def _table(self) -> Table:
        columns = [
            Column(Text(head), justify="right" if number in self.numbers else "left", no_wrap=True)
            for number, head in enumerate(self.heads)
        ]
        table = Table(*columns, box=None, show_header=any(self.heads), header_style="bold")
        for row in self.rows:
            table.add_row(*map(_cell, row))
        return table


def _cell(text: str, style: str = "") -> Text:
    return Text(text, STYLES.get(text, style))


def show(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
    """Show a table on stdout."""
    out.print(Fitting(heads, rows, numbers))
