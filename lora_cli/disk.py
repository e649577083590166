"""The operations on the disk that all writing consists of, each announced before it happens.

Only `storage` calls them. A test sets `watch`, to end the process at an operation, to have it fail, or to write down
what a power cut might lose.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_PIECE = 1 << 24  # bytes copied at once

watch: Callable[[str, Path, Any], None] | None = None  # (operation, path, bytes written or the new name)


def _announce(operation: str, path: Path, what: Any = None) -> None:
    if watch is not None:
        watch(operation, path, what)


class _Announced(io.FileIO):
    """A file whose writes are announced; its mode is 0666 less the umask."""

    def __init__(self, path: Path, mode: str) -> None:
        _announce("create" if mode == "xb" else "open", path)
        super().__init__(path, mode)
        self._path = path

    def write(self, data: Any) -> int:
        _announce("write", self._path, data)
        return super().write(data)


def create(path: Path) -> BinaryIO:
    """Open a file that must not be there yet, to write it."""
    return io.BufferedWriter(_Announced(path, "xb"))


def open_end(path: Path) -> io.FileIO:
    """Open a file, which is made where there is none, to write behind its end; nothing is kept back in memory."""
    return _Announced(path, "ab")


def copy(source: Path, path: Path) -> None:
    """Copy a file's content to one that must not be there yet."""
    with source.open("rb") as read, create(path) as written:
        while piece := read.read(_PIECE):
            written.write(piece)


def sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's entries, to the medium."""
    _announce("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name, in place of a file that has it."""
    _announce("rename", path, new)
    path.rename(new)


def link(path: Path, new: Path) -> None:
    """Give a file another name beside its own, which must be free."""
    _announce("link", path, new)
    os.link(path, new)


def make_folder(path: Path) -> None:
    """Make a folder, whose parent must be there."""
    _announce("mkdir", path)
    path.mkdir()


def remove(path: Path) -> None:
    """Delete a file."""
    _announce("unlink", path)
    path.unlink()


def remove_tree(path: Path) -> None:
    """Delete a folder and what is in it; of a link in it only the link."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            remove(entry)
    remove_folder(path)


def remove_folder(path: Path) -> None:
    """Delete an empty folder."""
    _announce("rmdir", path)
    path.rmdir()


def touch(path: Path) -> None:
    """Say that a file or folder was used now."""
    _announce("utime", path)
    os.utime(path)
