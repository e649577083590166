"""JSON that other programs or earlier runs left on the disk: an object of a reasonable size, or an error that says why.

What is read is as hostile as a download: cut, damaged, of other types than expected.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from lora_cli.errors import AdapterError, SurroundingsError, UserError, shown

LARGEST = 64 << 20  # bytes; what is read here is written in kilobytes
Record = TypeVar("Record")


def read_object(path: Path, kind: type[UserError] = AdapterError, state: str = "Nothing was read.") -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises `kind` with what is wrong with the file."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"{size:,} bytes are too many")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"an object was expected, found {type(values).__name__}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise kind(f"{path}: cannot be read: {error.strerror}.", state=state) from None
    except OSError as error:
        raise SurroundingsError(f"{path}: cannot be read: {error.strerror}.", state=state) from None
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise kind(
            f"{place}: this is not JSON: {error.msg}. It is damaged: fetch or copy it again.", state=state
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shown(error, 120)
        raise kind(f"{path}: cannot be read: {reason}. It is damaged: fetch or copy it again.", state=state) from None
    return values


@functools.cache
def _reader_of(record: Any) -> TypeAdapter[Any]:
    return TypeAdapter(record)


def checked(record: type[Record], values: Mapping[str, Any], path: Path) -> Record:
    """Return values out of a file as a record of ours, other keys left out. Raises AdapterError for a wrong type."""
    try:
        found: Record = _reader_of(cast(Any, record)).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            f"{path}: {shown('.'.join(map(str, first['loc'])))}: {shown(first['msg'])}, found {shown(first['input'])}. "
            "This is not what was written there; put the file back, or begin a new run.",
            state="Nothing was read.",
        ) from None
    return found


def is_number(value: object) -> bool:
    """Return whether a value out of JSON is a number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def as_text(values: Any) -> str:
    """Return plain values as indented JSON, as they are written here."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
