"""What a stream cannot show is written by stand-ins in ASCII, so that no output ends in a UnicodeEncodeError."""

import codecs
import io
from typing import TextIO

ERRORS = "lora.stand_ins"  # the name under which Python's streams know it
_STAND_INS = {
    **dict.fromkeys("─━═╌╴╸╺", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯", "+"),
    **dict.fromkeys("▏▎▍▌▋▊▉█", "#"),
    "…": "...",
    "→": "->",
    "±": "+-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "●": "o",
    "•": "*",
    "·": ".",
    "°": " deg",
    "\N{REPLACEMENT CHARACTER}": "?",
    **dict.fromkeys("–—−", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”„", '"'),
    "\N{NO-BREAK SPACE}": " ",
}


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    escaped = (char.encode("ascii", "backslashreplace").decode() for char in unknown)
    return "".join(_STAND_INS.get(char, escape) for char, escape in zip(unknown, escaped, strict=True)), error.end


codecs.register_error(ERRORS, _stand_in)


def use(stream: TextIO) -> None:
    """Have a stream write stand-ins for what its encoding does not have."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=ERRORS)


def is_utf8(stream: TextIO) -> bool:
    """Return whether a stream can show every character; one without an encoding holds text as it is."""
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf8")
