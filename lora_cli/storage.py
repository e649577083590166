"""The only code that writes: a file or a directory appears whole, by one rename, or not at all.

A directory carries MANIFEST.json with the size and SHA-256 of every file in it; `problems_in` checks them. The order
is write, fsync, hash, manifest, fsync, fsync the directory, rename, fsync its parent (Pillai et al., OSDI 2014,
"All File Systems Are Not Created Equal": without each of them a power cut may leave a torn or an empty file).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_cli.errors import AdapterError, SurroundingsError

MANIFEST = "MANIFEST.json"
_TEMPORARY = ".lora-tmp-"  # of what is being written; safe to delete when nobody holds the run's lock
# What a disk or a system answers that has no room, no right or no luck; never the fault of the program.
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ESTALE)
_SECONDS_UNTIL_HELD = 60  # between a temporary folder's making and its lock there is far less


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError into one that names the path, the reason and the free space."""
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
        raise SurroundingsError(
            f"{path}: cannot be written: {reason}.", state="What was there before is whole."
        ) from error


def read_text(path: Path) -> str:
    """Return a file's text, what is no UTF-8 replaced. Raises SurroundingsError, and FileNotFoundError."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SurroundingsError(f"{path}: cannot be read: {error.strerror}.", state="Nothing was written.") from error


def sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file by a temporary name and a rename."""
    raw = content.encode() if isinstance(content, str) else content
    with explained(path):
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON."""
    write_file(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line in one write."""
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is hashed, synced and renamed to `path`.

    On any error it is deleted. Raises AdapterError when `path` is already there, or is when it is to be renamed.
    """
    with _temporary_beside(path) as temporary:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        with explained(path):
            _seal(temporary)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise AdapterError(f"{path}: was written by another process in the meantime.") from None
            sync(path.parent)


@contextlib.contextmanager
def new_file(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary name for a file of about `size` bytes; on success it is synced and appears as `path`.

    On any error it is deleted. Raises AdapterError when `path` is already there, or is when it is to appear,
    SurroundingsError when the disk has not so much room or cannot be written.
    """
    require_writable(path.parent)
    require_room(path, size)
    with _temporary_beside(path) as folder, explained(path):
        temporary = folder / path.name
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        sync(temporary)
        try:
            os.link(temporary, path)  # unlike a rename, never over another file
        except FileExistsError:
            raise AdapterError(f"{path}: was written by another process in the meantime.") from None
        sync(path.parent)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path`, which must not be there; held, so that no other process sweeps it away."""
    _require_absent(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_unheld(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
    try:
        with explained(path):
            held = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield temporary
        finally:
            os.close(held)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is not there any more where all went well


def _sweep_unheld(folder: Path) -> None:
    """Delete what killed processes left here: temporary folders that nobody holds, older than one about to be held."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):  # of another user, or gone meanwhile
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if time.time() - os.stat(descriptor).st_mtime > _SECONDS_UNTIL_HELD:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            finally:
                os.close(descriptor)


def require_new(path: Path) -> None:
    """Raise AdapterError where a path that is to be written is there, SurroundingsError where it cannot be written.

    Call it before work that takes long.
    """
    _require_absent(path)
    require_writable(path)


def _require_absent(path: Path) -> None:
    with explained(path):
        is_there = path.exists()
    if is_there:
        raise AdapterError(f"{path}: already exists; it is never overwritten. Delete it or name another.")


def require_writable(path: Path) -> None:
    """Raise SurroundingsError unless a path can be written: tried where it is, or in the folder nearest to it."""
    with explained(path):
        if path.is_symlink() and not path.exists():
            raise OSError(f"it is a link to {os.readlink(path)}, which is not there")
        near = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if not near.is_dir():
            raise OSError(f"{near} is a file, not a folder")
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=near) as folder:
            tried = Path(folder) / path.absolute().relative_to(near) / "tried"
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.write_bytes(bytes(4096))
            sync(tried)
            tried.rename(tried.with_name("renamed"))
            sync(tried.parent)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_room(path: Path, size: int) -> None:
    """Raise SurroundingsError unless the disk of a path that is to be written has `size` bytes free."""
    near = next(parent for parent in path.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(near).free) < size:
        raise SurroundingsError(f"{path}: needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free.")


def _seal(folder: Path) -> None:
    """Sync every file and write the manifest."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in paths:
        file.chmod(0o666 & ~_umask())
        sync(file)
    with ThreadPoolExecutor() as pool:  # hashing holds no lock of the interpreter's
        digests = pool.map(sha256, paths)
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(paths, digests, strict=True)
    }
    write_json(folder / MANIFEST, {"files": files})
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync(inner)


def problems_in(folder: Path) -> list[str]:
    """Return what is wrong with a sealed directory: nothing when every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST}: cannot be read ({type(error).__name__})"]
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{folder / MANIFEST}: names a file outside its folder: {name[:80]}")
        elif not file.is_file():
            problems.append(f"{file}: is missing")
        elif file.stat().st_size != size:
            problems.append(f"{file}: has {file.stat().st_size} bytes, was written with {size}")
        elif sha256(file) != digest:
            problems.append(f"{file}: its content is not what was written (SHA-256 differs)")
    return problems


def remove_directory(path: Path) -> None:
    """Delete a directory of ours: first renamed, so that a half-deleted one never stands under its name."""
    with explained(path):
        doomed = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
        try:
            path.rename(doomed / path.name)
        finally:
            shutil.rmtree(doomed)


def is_temporary(path: Path) -> bool:
    """Return whether a file or folder is one of ours that was still being written."""
    return path.name.startswith(_TEMPORARY)


def sweep(folder: Path) -> None:
    """Delete what a killed process left half-written. Call it only under the run's lock."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
