"""What commands are documented to print with --json, and whether a text is exactly that."""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lora_cli.records import as_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_reference
from output_shapes import SHAPES, fields_of

__all__ = ["SHAPES", "fields_of", "make_reference", "require_shape"]


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def require_shape(record: Any, text: str) -> Any:
    """Return the one object in a text as a record. Raises where it is not exactly what the record is printed as."""
    values = json.loads(text, parse_constant=_no_number)
    found = TypeAdapter(record).validate_json(text, strict=True)
    assert as_json(found) == values
    return found
