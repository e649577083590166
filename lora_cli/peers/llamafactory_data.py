"""LLaMA-Factory's data sets, templates, lengths and held-out rows: what they are here.

A data set is a name that dataset_info.json describes. Keys and defaults: hiyouga/LLaMA-Factory, data/README.md and
src/llamafactory/hparams/data_args.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Rule, Source, Taken, Unsaid
from lora_cli.errors import ConfigError
from lora_cli.json_file import read_object
from lora_cli.peers.rows import Place, chat_template, message_fields, message_format, renamed, share

_TEMPLATES = {"chatml": "chatml", "zephyr": "zephyr", "alpaca": "alpaca"}
_OF_NO_MODEL = ("default", "empty", "vanilla", "fewshot")  # templates that no model brings
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
_KNOWN_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system",),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
}


@dataclass(frozen=True)
class Described:
    """A data set as dataset_info.json describes it: where its rows are, and how they are read here."""

    path: str
    settings: Mapping[str, Any]  # of a source: format, fields, subset, split
    lost: Mapping[str, str]  # what of the description cannot be honoured, and why


def holds_out(source: Source) -> bool:
    """Return whether rows are held out."""
    return bool(source.number("val_size")) or source.get("eval_dataset") is not None


def _names(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in listed if str(name).strip()]


def _info(source: Source) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the folder of the data sets and what dataset_info.json says of them; None where it is not here."""
    named = Path(str(source.get("dataset_dir", "data")))
    for folder in (source.path.parent / named, named, source.path.parent):
        if (folder / "dataset_info.json").is_file():
            return folder, read_object(folder / "dataset_info.json", ConfigError, "Nothing was written.")
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _described(folder: Path, entry: Mapping[str, Any], stage: str) -> Described:
    """Return how a data set is read here."""
    columns, tags = (_mapping(entry.get(key)) for key in ("columns", "tags"))
    settings: dict[str, Any] = {}
    lost = {key: "must be names" for key in ("columns", "tags") if entry.get(key) and not _mapping(entry[key])}
    lost |= {
        f"columns.{name}": "is not read" for name in columns if name not in (*_ALPACA, "messages", "tools", "chosen")
    }
    if name := entry.get("hf_hub_url"):
        path = str(name)
        settings |= {key: entry[key] for key in ("subset", "split") if entry.get(key) not in (None, "train")}
    else:
        path = str(folder / str(entry.get("file_name", "")))
        if not entry.get("file_name"):
            lost["file_name"] = "is missing: data sets of other hubs and loading scripts are not read; fetch the file"
    if entry.get("formatting", "alpaca") == "sharegpt":
        format = message_format(str(tags.get("role_tag", "from")), str(tags.get("content_tag", "value")))
        wanted = {"system": columns.get("system"), "tools": columns.get("tools")}
        if format is not None:
            wanted |= message_fields(format, str(columns.get("messages", "conversations")))
        else:
            lost["tags"] = "messages are {role, content} or {from, value} here: rename the keys in the rows"
        if entry.get("ranking"):
            lost["ranking"] = "preference pairs are not read: write each conversation with its chosen answer"
        lost |= {
            f"tags.{k}": "call the roles user and assistant"
            for k, v in tags.items()
            if v not in _KNOWN_TAGS.get(k, (v,))
        }
    elif stage == "pt":
        format, wanted = "text", {"text": str(columns.get("prompt", "text"))}
    else:
        answer = columns.get("chosen") if entry.get("ranking") else columns.get("response")
        format, wanted = "alpaca", {_ALPACA[key]: columns.get(key) for key in _ALPACA} | {"output": answer}
    if fields := renamed(wanted):
        settings["fields"] = fields
    lost |= {key: "rows are used as they are: cut the file" for key in ("num_samples", "folder") if entry.get(key)}
    return Described(path, {"format": format or "auto"} | settings, lost)


def _datasets(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of each data set that is trained on, by its name."""
    names, info = _names(source.get("dataset", "")), _info(source)
    stage = str(source.get("stage", "sft"))
    found = [
        _described(info[0], entry, stage) if info and (entry := _mapping(info[1].get(name))) else None for name in names
    ]
    alone = len(names) == 1 and not (found[0] and {"subset", "split"} & found[0].settings.keys())
    for index, (name, described) in enumerate(zip(names, found, strict=True)):
        key, place = f"dataset[{name}]", Place(None if alone else index)
        if described is None:
            path = f"{source.get('dataset_dir', 'data')}/{name}.json"
            where = "is not described in dataset_info.json" if info else "dataset_info.json is not beside the config"
            yield NotPossible(key, name, f"{where}; {path} is written: put the file of its rows there", True)
            yield Unsaid(place.key("path"), path, f"dataset: {name}, whose file is not known")
            continue
        yield Taken(key, name, place.key("path"), described.path, _read_as(described.settings))
        for setting, value in described.settings.items():
            yield Unsaid(place.key(setting), value, f"dataset_info.json, {name}")
        for part, why in described.lost.items():
            yield NotPossible(f"dataset_info.json[{name}].{part}", None, why, True)
    for one in source.given("dataset_dir"):
        yield NotNeeded(*one, "the paths of the data sets say it")


def _read_as(settings: Mapping[str, Any]) -> str:
    return "read as " + ", ".join(f"{key} {value}" for key, value in settings.items())


def _held_out(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the rows that are held out."""
    size, named = source.number("val_size"), source.get("eval_dataset")
    names, info = _names(named or ""), _info(source)
    entry = info[1].get(names[0]) if info and len(names) == 1 else None
    if info and isinstance(entry, dict) and entry.get("file_name"):
        yield Taken(
            "eval_dataset", named, "data.validation", str(info[0] / entry["file_name"]), "read as data.train is"
        )
    elif names:
        yield NotPossible("eval_dataset", named, "data.validation takes one file, a share, a number or a split", False)
        yield Unsaid("data.validation", 0, "what is held out there is not known")
    elif size is None:
        yield Unsaid("data.validation", 0, "nothing is held out there; a share would let the best adapter be chosen")
    else:
        yield Taken("val_size", size, "data.validation", share(size), "rows with the same prompt stay on one side")


def _template(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the template's name."""
    for key, value in source.given("template"):
        if value in _OF_NO_MODEL:
            yield NotPossible(
                key, value, "is of no model: write it as a Jinja file, and name that: data.chat_template", True
            )
        else:
            yield from chat_template(key, value, _TEMPLATES)


def _lengths(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the longest row, and of rows that are longer: there they are cut."""
    length = source.number("cutoff_len")
    if length is None:
        yield Unsaid("data.max_length", 2048, "their default of cutoff_len")
    else:
        yield Taken("cutoff_len", length, "data.max_length", length)
    yield Unsaid("data.too_long", "truncate", "prompt and answer are both cut there; drop or error keep answers whole")


RULES: Sequence[Rule] = (
    Rule(("dataset", "dataset_dir"), ("data.train", "data.format", "data.fields"), _datasets),
    Rule(("eval_dataset", "val_size"), ("data.validation",), _held_out),
    Rule(("template",), ("data.chat_template",), _template),
    Rule(("cutoff_len",), ("data.max_length", "data.too_long"), _lengths),
)
