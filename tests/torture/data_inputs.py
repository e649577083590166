"""Data files made wrong, for what reads rows up to conversations."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli import data
from lora_cli.data_config import DataConfig
from torture.mutations import VALUES, mutated_bytes, mutated_json

ASKED, TOLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ROWS: tuple[Any, ...] = (
    {"messages": [{"role": "system", "content": "s"}, ASKED, TOLD]},
    {"messages": [ASKED, {**TOLD, "weight": 0}, {"role": "user", "content": [{"type": "text", "text": "a"}]}, TOLD]},
    {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "content": "1"}, {**TOLD, "thinking": "t", "train": True}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'},
                       {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
    {"instruction": "Hi", "input": "", "output": "Hello", "system": "s"},
    {"prompt": "Hi", "completion": " Hello"},
    {"prompt": [ASKED], "completion": [TOLD]},
    {"text": "Hello"},
    {"question": "a", "answer": "b", "topic": 3},
)  # fmt: skip
_SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"format": "messages"}, {"format": "prompt-completion"}, {"validation": 2, "split_by": "topic"},
    {"fields": {"prompt": "question", "completion": "answer"}},
    {"prompt_template": "Q: {question} {topic}", "fields": {"completion": "answer"}},
)  # fmt: skip


def prepare(folder: Path) -> tuple[Callable[[random.Random], None], Callable[[], object]]:
    """Return what writes one more file of rows, and what reads it."""
    paths = {kind: folder / f"rows.{kind}" for kind in ("jsonl", "json", "csv")}
    configs = {
        kind: [DataConfig(**{"train": str(path), "validation": 0} | settings) for settings in _SETTINGS]
        for kind, path in paths.items()
    }
    for kind, text in (("csv", "text\na\n"), ("json", '[{"text": "a"}]'), ("jsonl", '{"text": "a"}\n')):
        paths[kind].write_text(text)  # what reading each needs is imported here
        data.require_readable(configs[kind][0])
    chosen = [configs["jsonl"][0]]

    def make(random: random.Random) -> None:
        kind, number, raw = made(random)
        chosen[0] = configs[kind][number]
        paths[kind].write_bytes(raw)

    return make, lambda: data.require_readable(chosen[0])


def made(random: random.Random) -> tuple[str, int, bytes]:
    """Return a kind of file, the number of the settings it is read with, and its bytes."""
    kind = random.choice(("jsonl", "jsonl", "json", "csv"))
    number = random.choice(range(len(_SETTINGS)))
    return kind, number, _file(kind, random)


def _file(kind: str, random: random.Random) -> bytes:
    rows = [random.choice(ROWS)] * random.randint(1, 3)
    match kind:
        case "jsonl":
            lines = [json.dumps(row).encode() for row in rows]
            lines[random.randrange(len(lines))] = mutated_json(random.choice(rows), random)
            return b"\n".join(lines)
        case "json":
            return mutated_json(rows, random)
        case _:
            return _table(rows[0], random)


def _table(row: Any, random: random.Random) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, random.choice(("excel", "excel", "unix", "excel-tab")))
    names = [name if random.random() < 0.9 else str(random.choice(VALUES)) for name in row]
    for fields in (names, row.values(), row.values()):
        writer.writerow([random.choice(VALUES) if random.random() < 0.1 else field for field in fields])
    raw = text.getvalue().encode("utf-8", "surrogatepass")
    return mutated_bytes(raw, random) if random.random() < 0.2 else raw
