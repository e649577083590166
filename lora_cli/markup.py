"""HTML and SVG as values: text is escaped, and secrets in it hidden, where it is put into an element; nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from lora_cli.errors import in_lines
from lora_cli.redact import redact

_VOID = ("meta", "br")


@dataclass(frozen=True)
class Html:
    """Text that is markup already."""

    text: str


Piece = Html | str | None


def tag(name: str, /, *inside: Piece, **attributes: object) -> Html:
    """Return an element; `class_` stands for class, `data_x` for data-x, and what is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{joined(inside).text}</{name}>"))


def joined(pieces: Iterable[Piece]) -> Html:
    """Return pieces one after the other."""
    return Html("".join(piece.text if isinstance(piece, Html) else _escaped(piece or "") for piece in pieces))


def _escaped(text: str) -> str:
    """Return a text as HTML shows it; what no page can show, or what turns letters around, is spelt out."""
    return escape(in_lines(redact(text)))
