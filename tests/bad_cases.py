"""The catalogue of bad inputs in tests/bad/: what is written there, put into a folder and given to the program.

A case is a name and what differs from a folder in which everything is right: `model/`, `rows.jsonl` with forty rows of
messages, `config.yaml` with four lines; and where `with` asks for them `run/`, a finished run of that config, and `a/`,
its adapter as other programs write one.

    config | more     the whole config.yaml, or lines behind the four
    write | latin-1   files by their paths; latin-1 gives them byte for byte
    repeat            files of [beginning, part, how many times, end]
    replace           files with one text put for another, everywhere
    json              keys to change in a JSON file, null to take one out
    delete | rename | cut | copy    files, cut by so many bytes
    with              run and a; the model is whole then
    whole             true leaves the model its weights; else their file is empty, so that none can be read
    tensors           tensors of a safetensors file: a number fills one, null takes it out, a list gives its shape
    command           what is typed; `train config.yaml` where it is not said
    late              true where it is found only with the tokenizer, so that torch is imported before
    exit, where       the exit code (2), and the place that a line of the message must begin with
    as json           the error is compared with what --json gives
    says, way out     what else it must hold: what is wrong with what was found, and what helps
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import conversation, write_rows

FOLDER = Path(__file__).parent / "bad"
AREAS = ("config", "data", "tokenizer", "model", "adapter", "surroundings")
FOUR_LINES = "model: model\ndata:\n  train: rows.jsonl\noutput_dir: run\n"
Case = Mapping[str, Any]


def cases(area: str) -> list[Any]:
    """The cases of one file, as parameters of a test."""
    found: dict[str, Case] = yaml.safe_load((FOLDER / f"{area}.yaml").read_text(encoding="utf-8"))
    return [pytest.param(case, id=f"{area}: {name}") for name, case in found.items()]


def listed(value: Any) -> list[str]:
    """One text or several, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def make_good(folder: Path, model: str, invoke: Callable[..., Any]) -> None:
    """Write a folder in which everything is right, with a finished run and an adapter."""
    write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    shutil.copytree(model, folder / "model")
    (folder / "config.yaml").write_text(FOUR_LINES)
    assert invoke("train", "config.yaml", "train.max_steps=2", "lora.rank=4")[0] == 0
    shutil.copytree(folder / "run" / "adapter", folder / "a")
    for name in ("MANIFEST.json", "base.json"):
        (folder / "a" / name).unlink()


def prepare(case: Case, folder: Path, good: Path | None) -> None:
    """Write what is right, then what the case makes wrong; `good` is None where no model is looked at."""
    write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    if good is not None:
        for name in ("model", *listed(case.get("with"))):
            shutil.copytree(good / name, folder / name)
        if not case.get("whole") and not case.get("with"):
            (folder / "model" / "model.safetensors").write_bytes(b"")
    (folder / "config.yaml").write_text(case.get("config", FOUR_LINES + case.get("more", "")), encoding="utf-8")
    for verb, apply in _VERBS.items():
        for name, value in case.get(verb, {}).items():
            apply(folder / name, value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_bytes(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))


def _write_repeated(path: Path, parts: tuple[str, str, int, str]) -> None:
    begin, part, times, end = parts
    path.write_text(begin + part * times + end)


def _replace(path: Path, texts: tuple[str, str]) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(*texts), encoding="utf-8")


def _change_json(path: Path, values: Mapping[str, Any]) -> None:
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def _cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def _delete(path: Path, _: object) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _change_tensors(path: Path, changes: Mapping[str, Any]) -> None:
    tensors = safetensors.torch.load_file(path)
    for name, change in changes.items():
        match change:
            case None:
                del tensors[name]
            case list():
                tensors[name] = torch.ones(change)
            case _:
                tensors[name] = torch.full_like(tensors[name], change)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


_VERBS: dict[str, Callable[[Path, Any], object]] = {
    "copy": lambda path, source: shutil.copytree(path.parent / source, path),
    "write": _write,
    "latin-1": _write_bytes,
    "repeat": _write_repeated,
    "replace": _replace,
    "json": _change_json,
    "tensors": _change_tensors,
    "rename": lambda path, name: path.rename(path.with_name(name)),
    "cut": _cut,
    "delete": _delete,
}


def contents(*folders: Path) -> Iterator[tuple[str, bytes | None]]:
    """Everything below some folders, with what is in it."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            yield str(path), path.read_bytes() if path.is_file() else None


def problems_of(case: Case, code: int, out: str, err: str) -> list[str]:
    """What is wrong with how the program answered: nothing where it is as it should be."""
    _, _, paragraph = f"\n{err}".rstrip("\n").partition("\nerror: ")
    lines = paragraph.split("\n")
    wrong = []
    if code != case.get("exit", 2):
        wrong.append(f"exit code {code}")
    if not paragraph or "Traceback" in err or "" in lines or out:
        wrong.append("not one paragraph on stderr")
    if not any(line.startswith(case.get("where", "")) for line in lines):
        wrong.append(f"no line begins with {case['where']}")
    for words in (*listed(case["says"]), *listed(case["way out"])):
        if words not in paragraph:
            wrong.append(f"does not say: {words}")
    if not any(sign in lines[-1] for sign in ("Nothing was ", "nothing was ", " is whole")):
        wrong.append("does not say what state things are in")
    if not paragraph.replace("\n", "").isprintable():
        wrong.append("holds what cannot be printed")
    if shown := next((piece for piece in _long_pieces(case) if piece in paragraph), None):
        wrong.append(f"shows more than 80 characters of what stands there: {shown}")
    return wrong


def _long_pieces(value: Any) -> Iterator[str]:
    """Every 100 characters that stand side by side in a line of a case: more than a key and 80 of its value."""
    if isinstance(value, dict):
        value = [part for inner in value.items() for part in inner]
    if isinstance(value, str):
        for line in value.splitlines():
            yield from (line[begin : begin + 100] for begin in range(len(line) - 99))
    elif isinstance(value, list):
        if len(value) == 4 and isinstance(value[2], int):
            yield from _long_pieces(value[0] + value[1] * min(value[2], 200) + value[3])
        for inner in value:
            yield from _long_pieces(inner)
