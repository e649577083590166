"""What a source names: a file, a folder, a glob or a split of a hub data set -> its files."""

import codecs
import glob
from pathlib import Path

from lora_cli.data_file import PACKED, SUFFIXES, DataFile, explained, holds_lines, kind_of
from lora_cli.errors import NOTHING_LOADED, DataError, SurroundingsError, first_line_of, shown
from lora_cli.nearby import did_you_mean


def find_files(source: str, subset: str | None = None, split: str | None = None) -> list[DataFile]:
    """Return the files of a source: a file, a folder, a glob, or a split of (a subset of) a hub data set.

    Raises DataError, SurroundingsError.
    """
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for the system, or ~ of a user it does not know
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{shown(source)}: is no path here: {reason}.", state=NOTHING_LOADED) from None
    if is_file:
        paths = [path]
    elif is_folder:
        paths = sorted(p for p in path.iterdir() if p.is_file() and kind_of(p) is not None and p.name[0] != ".")
        if not paths:
            raise DataError(f"{path}: this folder has no {SUFFIXES} file.", state=NOTHING_LOADED)
    elif glob.has_magic(source):
        paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not paths:
            raise DataError(f"{source}: no file matches. Paths are read from {Path.cwd()}.", state=NOTHING_LOADED)
    elif is_hub_id(source):
        return [_fetch(source, subset, split or "train")]
    else:
        hint = did_you_mean(path) or f" Paths are read from {Path.cwd()}."
        raise DataError(f"{source}: no such file.{hint}", state=NOTHING_LOADED)
    if subset or split:
        raise DataError(
            f"{source}: is no hub data set, so it has no subset or split ({subset or split}).", state=NOTHING_LOADED
        )
    return [_data_file(path) for path in paths]


def _data_file(path: Path) -> DataFile:
    kind = kind_of(path)
    if kind is None or (kind == "parquet" and path.suffix in PACKED):
        raise DataError(f"{path}: expected a file that ends in {SUFFIXES}.", state=NOTHING_LOADED)
    file = DataFile(str(path), (path,), kind)
    with explained(file):
        if kind == "json" and holds_lines(path):
            return DataFile(str(path), (path,), "jsonl")
    return file


def _fetch(name: str, subset: str | None, split: str) -> DataFile:
    """Return a split of a hub data set, downloaded where needed."""
    if set(split) & set("[+"):
        raise DataError(
            f"{name}: the split {split!r} is a part of one, which is not read; name a whole split (train, test, ...).",
            state=NOTHING_LOADED,
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except FileNotFoundError as error:  # of which datasets' DatasetNotFoundError is one
        raise DataError(
            f'data: "{name}" is no file here, and no data set that the hub shows: {first_line_of(error)}.'
            + did_you_mean(Path(name)),
            state=NOTHING_LOADED,
        ) from None
    except (ConnectionError, OSError) as error:
        raise SurroundingsError(
            f'data: "{name}" is no file here, and as a hub data set it cannot be reached: {first_line_of(error)}.'
            + did_you_mean(Path(name)),
            state=NOTHING_LOADED,
        ) from None
    except Exception as error:  # the hub client raises many kinds for a name or split that is not there
        raise DataError(
            f'data: the hub data set "{name}" cannot be read: {first_line_of(error)}.', state=NOTHING_LOADED
        ) from None
    return DataFile(
        f"{name}[{f'{subset}/' if subset else ''}{split}]",
        tuple(Path(file["filename"]) for file in rows.cache_files),
        "arrow",
    )


MOST_TEXT = 4 << 20  # bytes of a plain text that are read


def is_plain_text(source: str) -> bool:
    """Return whether a source is a file of plain text, not of rows."""
    path = Path(source).expanduser()
    return path.is_file() and kind_of(path) is None


def read_plain_text(path: Path) -> str:
    """Return a file's text, of a long one the first 4 MiB. Raises DataError, SurroundingsError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_TEXT)
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=len(raw) < MOST_TEXT)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.", state=NOTHING_LOADED
        ) from None
    except OSError as error:
        raise SurroundingsError(f"{path}: cannot be read: {error.strerror}.", state=NOTHING_LOADED) from None
    if not text.strip():
        raise DataError(f"{path}: holds no text; name another file.", state=NOTHING_LOADED)
    return text


def is_hub_id(source: str) -> bool:
    """Return whether a source can only be a hub data set: no file or folder here, and not spelt like one."""
    path = Path(source).expanduser()
    spelt_as_path = (
        kind_of(path) is not None
        or path.suffix == ".txt"
        or source.startswith(("/", ".", "~"))
        or source.count("/") > 1
        or (path.suffix != "" and "/" not in source)  # a misspelt file.jsnl; no hub data set without an owner has a dot
    )
    return not path.exists() and not spelt_as_path and not glob.has_magic(source)
