"""MANIFEST.json of a sealed directory: the size and SHA-256 of every file in it, and whether they still are those."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_cli import json_file, names

MANIFEST = "MANIFEST.json"
SMALL = 1 << 20  # bytes that are written and read sooner than a thread is started


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Sequence[Path]) -> list[str]:
    if sum(path.stat().st_size for path in paths) < SMALL:
        return [sha256(path) for path in paths]
    with ThreadPoolExecutor() as pool:  # hashing holds no lock of the interpreter's
        return list(pool.map(sha256, paths))


def text_of(folder: Path, paths: Sequence[Path]) -> str:
    """Return the manifest of a folder with these files."""
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(paths, _digests(paths), strict=True)
    }
    return json_file.as_text({"files": files})


def problems_in(folder: Path, unread: str | None = None) -> list[str]:
    """Return what is wrong with a sealed directory: nothing when every file is as it was written.

    Of files whose names end in `unread` only the size is looked at.
    """
    listed = folder / MANIFEST
    try:
        text = listed.read_text(encoding="utf-8")
        values = json.loads(text)
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in values["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return [f"{listed}: cannot be read ({type(error).__name__})"]
    problems, whole = [], dict[str, Path]()
    for name, (size, _) in expected.items():
        file = folder / name
        if reason := names.problem_with(name):
            problems.append(f"{listed}: names a file {name[:80]!r}, which {reason}")
        elif not file.is_file():
            problems.append(f"{file}: is missing")
        elif file.stat().st_size != size:
            problems.append(f"{file}: has {file.stat().st_size} bytes, was written with {size}")
        elif unread is None or not name.endswith(unread):
            whole[name] = file
    for name, digest in zip(whole, _digests(list(whole.values())), strict=True):
        if digest != expected[name][1]:
            problems.append(f"{whole[name]}: its content is not what was written (SHA-256 differs)")
    if not problems and text != json_file.as_text(values):  # a name that stands in it twice hides a file
        problems.append(f"{listed}: is not as it was written")
    return problems
