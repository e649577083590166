"""Whether what is to be written can be: looked at before work that takes long."""

import os
import shutil
from pathlib import Path

from lora_cli import storage
from lora_cli.errors import SurroundingsError


def require_new(path: Path) -> None:
    """Raise AdapterError where a path that is to be written is there, SurroundingsError where it cannot be written.

    Call it before work that takes long.
    """
    storage.require_absent(path)
    require_writable(path)


def require_writable(path: Path, key: str = "") -> None:
    """Raise SurroundingsError unless a path can be written: tried where it is, or in the folder nearest to it."""
    with storage.explained(path, key):
        if path.is_symlink() and not path.exists():
            raise OSError(f"it is a link to {os.readlink(path)}, which is not there")
        near = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if not near.is_dir():
            raise OSError(f"{near} is a file, not a folder; name another")
        storage.sweep_unheld(near)
        temporary = storage.temporary_name(near)
        tried = temporary / path.absolute().relative_to(near) / "tried"
        try:
            storage.make_folder(tried.parent)
            storage.write_file(tried, bytes(4096))
        except SurroundingsError as error:  # which names what was tried
            raise error.__cause__ or error from None
        finally:
            storage.clear(temporary)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_room(path: Path, size: int) -> None:
    """Raise SurroundingsError unless the disk of a path that is to be written has `size` bytes free."""
    near = next(parent for parent in path.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(near).free) < size:
        raise SurroundingsError(f"{path}: needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free.")
