"""Tables that stay readable where the terminal is narrow: a row that does not fit becomes a block of its own."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from lora_cli.console import out
from lora_cli.errors import one_line

STYLES = {"better": "green", "worse": "bold red", "yes": "green", "no": "red", "the best": "bold green"}


class Fitting:
    """A table of text; where it is too wide each row is a block: its first cell, then the others by their heads.

    With `by_column` it is the columns that become blocks. `numbers` are columns that are aligned on the right.
    """

    def __init__(
        self,
        heads: Sequence[str],
        rows: Sequence[Sequence[str]],
        numbers: Sequence[int] = (),
        by_column: bool = False,
    ) -> None:
        self.heads, self.rows, self.numbers, self.by_column = heads, rows, numbers, by_column

    def fits(self, console: Console, width: int) -> bool:
        """Return whether the table is no wider than that."""
        as_wide_as_it_is = console.options.update(max_width=10_000)
        return Measurement.get(console, as_wide_as_it_is, self._table()).maximum <= width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.fits(console, options.max_width):
            yield self._table()
            return
        (name, *heads), *rows = (
            zip(*[self.heads, *self.rows], strict=True) if self.by_column else [self.heads, *self.rows]
        )
        for first, *cells in rows:
            yield _cell(f"{name} {first}".lstrip(), "bold")
            block = Table(Column(style="dim", min_width=max(map(len, heads))), Column(), box=None, show_header=False)
            for head, cell in zip(heads, cells, strict=True):
                if cell:
                    block.add_row(f" {head}", _cell(cell))
            yield block

    def _table(self) -> Table:
        columns = [
            Column(Text(head), justify="right" if number in self.numbers else "left", no_wrap=True)
            for number, head in enumerate(self.heads)
        ]
        table = Table(*columns, box=None, show_header=any(self.heads), header_style="bold", pad_edge=False)
        for row in self.rows:
            table.add_row(*map(_cell, row))
        return table


def _cell(text: str, style: str = "") -> Text:
    return Text(one_line(text), STYLES.get(text, style))


def last_parts(keys: Sequence[str]) -> list[str]:
    """Return dotted keys as heads of columns: their last parts, where these differ."""
    parts = [key.rsplit(".", 1)[-1] for key in keys]
    return parts if len(set(parts)) == len(parts) else list(keys)


def show(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), by_column: bool = False
) -> None:
    """Show a table on stdout."""
    out.print(Fitting(heads, rows, numbers, by_column))
