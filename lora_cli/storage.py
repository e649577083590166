"""The only code that writes: a file or a directory appears whole, by one rename, or not at all.

A directory carries MANIFEST.json with the size and SHA-256 of every file in it (`manifest` checks them). The order is
write, fsync, hash, manifest, fsync, fsync the directory, rename, fsync its parent (Pillai et al., OSDI 2014, "All File
Systems Are Not Created Equal": without each of them a power cut may leave a torn or an empty file). What a function
here has written is on the medium when it returns; of appended lines only `keep` says so.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli import disk, interrupt, json_file, manifest
from lora_cli.errors import AdapterError, SurroundingsError, shown
from lora_cli.manifest import MANIFEST

_TEMPORARY = ".lora-tmp-"  # of what is being written; safe to delete when nobody holds the run's lock
# What a disk or a system answers that has no room, no right or no luck; never the fault of the program.
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ESTALE)
_SECONDS_UNTIL_HELD = 60  # between a temporary folder's making and its lock there is far less


@contextlib.contextmanager
def explained(path: Path, key: str = "") -> Iterator[None]:
    """Turn an OSError into one that names the path (and the key that gave it), the reason and the free space."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            near = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            whose = "your share of the disk" if error.errno == errno.EDQUOT else "the disk"
            reason = f"{whose} is full ({shutil.disk_usage(near).free / 1e6:.0f} MB free)"
        if error.errno == errno.EFBIG:
            reason = "a file would be larger than this process may write (ulimit -f)"
        name = f"{key}: {_short(path)}" if key else _short(path)
        raise SurroundingsError(
            f"{name}: cannot be written: {reason}.", state="What was there before is whole."
        ) from error


def _short(path: Path) -> str:
    """Return a path as it is, but not the whole of one that no system could have."""
    return str(path) if len(str(path)) < 1000 else shown(path)


# --- one file ---


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, in place of one that is there, by a temporary name and a rename."""
    with explained(path):
        temporary = temporary_name(path.parent)
        try:
            add_file(temporary, content)
            disk.sync(temporary)
            disk.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.remove(temporary)
            raise
        disk.sync(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, in place of a file that is there."""
    write_file(path, json_file.as_text(values))


@contextlib.contextmanager
def appending(path: Path) -> Iterator[FileIO]:
    """Yield a file to append lines to; it is made where there is none."""
    with explained(path):
        file = disk.open_end(path)
    with file:
        yield file


def append_line(file: FileIO, line: str) -> None:
    """Append one line, in one write where the system takes it whole. It may be lost with the power until `keep`."""
    rest = f"{line}\n".encode()
    with explained(Path(file.name)):
        while rest:
            rest = rest[file.write(rest) :]


def keep(path: Path) -> None:
    """Have the system write the lines that were appended to the medium."""
    with explained(path):
        disk.sync(path)


# --- the files of a new directory, which is sealed when it is whole ---


def adding(path: Path) -> BinaryIO:
    """Open a file of a new directory, to write it piece by piece."""
    return disk.create(path)


def add_file(path: Path, content: str | bytes) -> None:
    """Write a file of a new directory."""
    with adding(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def add_json(path: Path, values: Any) -> None:
    """Write plain values as a file of a new directory."""
    add_file(path, json_file.as_text(values))


def add_copy(source: Path, path: Path) -> None:
    """Copy a file into a new directory."""
    disk.copy(source, path)


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it; nothing where it is there."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another process made it in the meantime
        disk.make_folder(path)
    disk.sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is hashed, synced and renamed to `path`.

    On any error it is deleted. Raises AdapterError when `path` is already there, or is when it is to be renamed.
    """
    with _temporary_beside(path) as temporary:
        yield temporary
        with explained(path):
            _seal(temporary)
            try:
                disk.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise AdapterError(f"{path}: was written by another process in the meantime.") from None
            disk.sync(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file; on success it is synced and appears as `path`.

    On any error it is deleted. Raises AdapterError when `path` is already there, or is when it is to appear.
    """
    with _temporary_beside(path) as folder, explained(path):
        temporary = folder / path.name
        yield temporary
        disk.sync(temporary)
        try:
            disk.link(temporary, path)  # unlike a rename, never over another file
        except FileExistsError:
            raise AdapterError(f"{path}: was written by another process in the meantime.") from None
        disk.sync(path.parent)


def temporary_name(folder: Path) -> Path:
    """Return a name in a folder for what is not whole yet; `sweep` knows it again."""
    return folder / f"{_TEMPORARY}{secrets.token_hex(6)}"


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path`, which must not be there; held, so that no other process sweeps it away."""
    require_absent(path)
    with explained(path):
        make_folder(path.parent)
        sweep_unheld(path.parent)
        temporary = temporary_name(path.parent)
        disk.make_folder(temporary)
    try:
        with explained(path):
            held = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            with interrupt.patience():
                yield temporary
        finally:
            os.close(held)
    finally:
        clear(temporary)  # it is not there any more where all went well


def sweep_unheld(folder: Path) -> None:
    """Delete what killed processes left here: temporary folders that nobody holds, older than one about to be held."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):  # of another user, or gone meanwhile
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if time.time() - os.stat(descriptor).st_mtime > _SECONDS_UNTIL_HELD:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    disk.remove_tree(left)
            finally:
                os.close(descriptor)


def require_absent(path: Path) -> None:
    """Raise AdapterError where a path that is to be written is there."""
    with explained(path):
        is_there = path.exists()
    if is_there:
        raise AdapterError(f"{path}: already exists; it is never overwritten. Delete it or name another.")


def _seal(folder: Path) -> None:
    """Sync every file, write the manifest, and sync every folder."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in paths:
        disk.sync(file)
    add_file(folder / MANIFEST, manifest.text_of(folder, paths))
    disk.sync(folder / MANIFEST)
    for inner in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        disk.sync(inner)


def remove_directory(path: Path) -> None:
    """Delete a directory of ours: first renamed, so that a half-deleted one never stands under its name."""
    with explained(path):
        doomed = temporary_name(path.parent)
        disk.rename(path, doomed)
        disk.sync(path.parent)
        disk.remove_tree(doomed)


def clear(temporary: Path) -> None:
    """Delete a temporary folder, as far as that is possible."""
    with contextlib.suppress(OSError):
        disk.remove_tree(temporary)


def rename(path: Path, new: Path) -> None:
    """Give a file another name in its folder."""
    disk.rename(path, new)
    disk.sync(new.parent)


def remove_file(path: Path) -> None:
    """Delete a file of ours, where it is there."""
    with contextlib.suppress(FileNotFoundError):
        disk.remove(path)


def remove_empty(path: Path) -> None:
    """Delete a folder, unless something is in it."""
    if not any(path.iterdir()):
        disk.remove_folder(path)


def touch(path: Path) -> None:
    """Say that a directory was used now, where that may be said."""
    with contextlib.suppress(OSError):
        disk.touch(path)


def is_temporary(path: Path) -> bool:
    """Return whether a file or folder is one of ours that was still being written."""
    return path.name.startswith(_TEMPORARY)


def sweep(folder: Path) -> None:
    """Delete what a killed process left half-written. Call it only under the run's lock."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if left.is_dir():
                disk.remove_tree(left)
            else:
                disk.remove(left)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go of it when the process ends, however it ends."""
    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AdapterError(f"{folder}: another process is using this run directory.") from None
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):  # deleted, and made anew, before it was held
            raise AdapterError(f"{folder}: another process began in this run directory at the same time.")
        yield
    finally:
        os.close(descriptor)
