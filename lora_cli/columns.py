"""Which columns of foreign rows are prompt and answer, by the names that data sets give them."""

from collections.abc import Mapping
from typing import Any

from lora_cli.conversation import Row
from lora_cli.data import detect_format, first_row, require_readable
from lora_cli.data_config import DataConfig

_PROMPTS = ("prompt", "question", "query", "instruction", "input", "source", "text", "sentence", "document", "article")
_ANSWERS = (
    "completion",
    "answer",
    "response",
    "output",
    "target",
    "label",
    "category",
    "intent",
    "summary",
    "solution",
)


def settings_for(train: str) -> dict[str, tuple[Any, str]]:
    """Return the settings under which training data can be read, by dotted key, each with its reason.

    Raises DataError with the rows that cannot, SurroundingsError.
    """
    found = find(first_row(train))
    values = {key.removeprefix("data."): value for key, (value, _) in found.items()}
    require_readable(DataConfig(train=train, **values))
    return found


def find(row: Row) -> dict[str, tuple[Any, str]]:
    """Return settings under which rows like this one can be read, each with its reason; none where none are needed."""
    format = detect_format(row)
    if format == "preference":
        return _of_preference(row)
    names: Mapping[str, str] = {str(name).lower(): str(name) for name in row}
    prompt = next((names[name] for name in _PROMPTS if name in names), None)
    answer = next((names[name] for name in _ANSWERS if name in names and isinstance(row[names[name]], str)), None)
    if prompt is None or answer is None or format not in (None, "text"):
        return {}
    return {"data.fields": ({"instruction": prompt, "output": answer}, f"the columns are {', '.join(map(str, row))}")}


def _of_preference(row: Row) -> dict[str, tuple[Any, str]]:
    """Return how to train on the chosen answers alone."""
    whole = "prompt" not in row
    format, field = ("messages", "messages") if whole else ("prompt-completion", "completion")
    reason = "the rows are preference pairs, and only their chosen answers can be trained on"
    return {"data.format": (format, reason), "data.fields": ({field: "chosen"}, reason)}
