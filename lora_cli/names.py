"""Names that files give to other files: from an index, a manifest or the hub, only plain ones are taken.

Who writes such a file may not be the user. A name is read as every system would read it, so that what is refused on one
machine is refused on all.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

LONGEST, LONGEST_PART = 1024, 255  # bytes
_DEVICES = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)  # of Windows


def problem_with(name: object) -> str | None:
    """Return why a name is no plain relative path inside its folder, on any system; None where it is one.

    Parts are separated by `/`; a name without it is of a file in the folder itself.
    """
    if not isinstance(name, str):
        return f"is no text but {type(name).__name__}"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "holds half of a character"
    if not name or size > LONGEST or any(len(part.encode()) > LONGEST_PART for part in name.split("/")):
        return f"has {size} bytes; a name has 1 to {LONGEST_PART}, a path at most {LONGEST}"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in name):
        return "holds a character that does not show"
    return next(filter(None, map(_problem_of_path, (name, unicodedata.normalize("NFKC", name)))), None)


def _problem_of_path(name: str) -> str | None:
    """Return what is wrong with the parts of a path."""
    if name.startswith(("/", "~")):
        return "begins at the root or at a home folder"
    if found := set(name) & set('\\:*?"<>|'):
        return f"holds {sorted(found)[0]}, which separates parts, names a drive or cannot be in a name"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "leads out of its folder, or round about"
        if part.endswith((".", " ")) or part.startswith(" ") or _DEVICES.fullmatch(part):
            return "is another file, or a device, on Windows"
    return None


def iter_links_out(folder: Path) -> Iterator[Path]:
    """Iterate over the symbolic links inside a folder that lead out of it; they are not followed."""
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                yield path
