"""One file of rows, whatever its kind -> blocks of rows, each row with its place (`train.jsonl:12`).

A file is read block by block, whatever its size. Lines of JSON are cut here and parsed by `Block.rows`, which may run
in another process; the other kinds are parsed while they are read.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow
import pyarrow.ipc

from lora_cli.errors import NOTHING_LOADED, DataError, SurroundingsError, shown

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow"]
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
SUFFIXES = ", ".join(_KINDS) + f" ({' or '.join(PACKED)} behind them for compressed ones)"
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1024
LONGEST_LINE = 64 << 20  # bytes; a longer row is a mistake in the file
csv.field_size_limit(LONGEST_LINE)


@dataclass(frozen=True)
class Broken:
    """What stands where a row should be, and is none; it is reported together with the others."""

    problem: str


@dataclass(frozen=True)
class Block:
    """Some neighbouring rows of a file: their numbers, and each as a line of JSON, a parsed row, or Broken."""

    numbers: list[int]
    items: list[Any]
    size: int  # bytes of the file it stands for

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Iterate over (number, row or Broken)."""
        for number, item in zip(self.numbers, self.items, strict=True):
            yield number, _parse_line(item) if isinstance(item, bytes) else item


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or the Arrow files of one split of a hub data set."""

    name: str
    paths: tuple[Path, ...]
    kind: Kind

    def place(self, number: int) -> str:
        """Return where a row stands: by its line where the file is text, else by its number."""
        return f"{self.name}:{number}" if self.kind in ("jsonl", "csv") else f"{self.name}: row {number}"

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in self.paths)

    def digest(self) -> str:
        """Return the SHA-256 of the content."""
        digest = hashlib.sha256()
        with explained(self):
            for path in self.paths:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """Read the file block by block. Raises DataError, SurroundingsError."""
        with explained(self):
            match self.kind:
                case "jsonl":
                    yield from _blocks_of_lines(self)
                case "json":
                    yield from _gathered(_rows_of_json(self))
                case "csv":
                    yield from _gathered(_rows_of_csv(self))
                case "parquet" | "arrow":
                    yield from _blocks_of_tables(self)


class explained:  # noqa: N801 - used as a function
    """Turn what reading a file can raise into errors that name it."""

    def __init__(self, file: DataFile) -> None:
        self.name = file.name
        self.kind = file.kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case UnicodeDecodeError():
                raise DataError(
                    f"{self.name}: not UTF-8 text (byte {error.start}); save it as UTF-8.", state=NOTHING_LOADED
                ) from None
            case EOFError() | gzip.BadGzipFile() | zlib.error() | OverflowError() | pyarrow.ArrowException():
                raise self._damaged(error) from None
            case OSError() if error.errno is None:  # pyarrow's: what it unpacks is not packed so
                raise self._damaged(error) from None
            case OSError():
                reason = error.strerror or str(error)[:200]
                raise SurroundingsError(f"{self.name}: cannot be read: {reason}.", state=NOTHING_LOADED) from None

    def _damaged(self, error: BaseException) -> DataError:
        reason = f"{self.name}: this is not {self.kind}, or it is cut short: {shown(error, 120)}."
        return DataError(f"{reason} Fetch or write the file again.", state=NOTHING_LOADED)


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a file by its name; None for other files."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return _KINDS.get(name.suffix.lower())


# --- bytes ---


def _open(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".zst":
            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _blocks_of_lines(file: DataFile) -> Iterator[Block]:
    with _open(file.paths[0]) as opened:
        number, numbers, lines, size = 0, list[int](), list[Any](), 0
        while line := opened.readline(LONGEST_LINE + 1):
            number += 1
            size += len(line)
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{file.name}: is UTF-16 text; save it as UTF-8.", state=NOTHING_LOADED)
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{file.place(number)}: the line has more than {LONGEST_LINE >> 20} MiB; a row stands on a line.",
                    state=NOTHING_LOADED,
                )
            if line.strip():
                numbers.append(number)
                lines.append(line)
            if size >= BLOCK_BYTES:
                yield Block(numbers, lines, size)
                numbers, lines, size = [], [], 0
        if lines:
            yield Block(numbers, lines, size)


def _gathered(rows: Iterator[tuple[int, Any]]) -> Iterator[Block]:
    numbers, items = list[int](), list[Any]()
    for number, row in rows:
        numbers.append(number)
        items.append(row)
        if len(items) == BLOCK_ROWS:
            yield Block(numbers, items, 0)
            numbers, items = [], []
    if items:
        yield Block(numbers, items, 0)


# --- JSON ---


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{shown(twice)}" stands twice; leave one out')
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON knows; write null")


def parse_json(text: str) -> Any:
    """Return a JSON value. Raises ValueError with what is wrong, json.JSONDecodeError with its place."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply; flatten it") from None


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode().rstrip())
    except UnicodeDecodeError as error:
        return Broken(f": not UTF-8 text (byte {error.start} of the line); save it as UTF-8.")
    except json.JSONDecodeError as error:
        return Broken(f":{error.colno}: this is not JSON: {error.msg}; a row is an object on one line.")
    except ValueError as error:
        return Broken(f": {error}.")


def _rows_of_json(file: DataFile) -> Iterator[tuple[int, Any]]:
    with _open(file.paths[0]) as opened:
        text = opened.read().decode("utf-8-sig")
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file.name}:{error.lineno}:{error.colno}: this is not JSON: {error.msg}. Fetch or write the file again.",
            state=NOTHING_LOADED,
        ) from None
    except ValueError as error:
        raise DataError(f"{file.name}: {error}.", state=NOTHING_LOADED) from None
    if not isinstance(rows, list):
        raise DataError(f"{file.name}: expected a list of rows, found {type(rows).__name__}.", state=NOTHING_LOADED)
    yield from enumerate(rows, start=1)


def holds_lines(path: Path) -> bool:
    """Return whether a file named .json holds one object a line."""
    with _open(path) as opened:
        first, second = opened.readline(LONGEST_LINE).removeprefix(codecs.BOM_UTF8), opened.readline(2)
    return bool(second) and first.lstrip().startswith(b"{") and first.rstrip().endswith(b"}")


# --- tables ---


def _rows_of_csv(file: DataFile) -> Iterator[tuple[int, Any]]:
    with io.TextIOWrapper(_open(file.paths[0]), encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened, strict=True)
        begins = 1
        try:
            names = list(reader.fieldnames or ())
            if len(set(names)) < len(names) or (len(names) == 1 and ";" in names[0]):
                what = (
                    "names a column twice; give each a name of its own"
                    if len(names) > 1
                    else "is cut by semicolons; commas are needed"
                )
                raise DataError(f"{file.place(1)}: the header {what}.", state=NOTHING_LOADED)
            begins = reader.line_num + 1
            for row in reader:
                found = sum(value is not None for name, value in row.items() if name is not None)
                found += len(row.get(None) or ())  # where the reader puts what is too many
                wrong = f": has {found} fields, and the header {len(names)}; put a field that holds a comma in quotes."
                yield begins, row if found == len(names) else Broken(wrong)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{file.place(begins)}: this is not CSV: {error}.", state=NOTHING_LOADED) from None


def _blocks_of_tables(file: DataFile) -> Iterator[Block]:
    number = 0
    for batch in _batches(file):
        count, names = batch.num_rows, batch.schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f'{file.name}: names the column "{twice}" twice.', state=NOTHING_LOADED)
        rows = [{key: _without_nulls(value) for key, value in row.items()} for row in batch.to_pylist()]
        yield Block(list(range(number + 1, number + count + 1)), rows, batch.nbytes)
        number += count


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null inside it: a table has every key that any of its rows has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _batches(file: DataFile) -> Iterator[pyarrow.RecordBatch]:
    for path in file.paths:
        if file.kind == "parquet":
            from pyarrow import parquet  # only here: other files are read without it

            with parquet.ParquetFile(path) as opened:
                yield from opened.iter_batches(batch_size=BLOCK_ROWS)
        else:
            with pyarrow.memory_map(str(path)) as opened:
                yield from pyarrow.ipc.open_stream(opened)
