"""lora init --from: the config of another program as one of ours, with what became of each of its keys."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli import config_file, config_text, init
from lora_cli.config import RunConfig
from lora_cli.conversion import (
    ConversionReport,
    NotNeeded,
    NotPossible,
    Outcome,
    Peer,
    Source,
    Taken,
    Unsaid,
    is_off,
    reason_for,
    said,
)
from lora_cli.errors import ConfigError, one_line, shown
from lora_cli.peers.axolotl import AXOLOTL
from lora_cli.peers.llamafactory import LLAMA_FACTORY
from lora_cli.redact import HIDDEN, redact
from lora_cli.schema import OnResume, rules
from lora_cli.strict_yaml import dump_inline

_SECRET = re.compile(r"api_?key|hub_token|hf_token|access_token|secret|password|webhook", re.IGNORECASE)
PEERS = (AXOLOTL, LLAMA_FACTORY)

# Other programs, and keys by which their configs are known.
_OTHERS = {
    "TRL": ({"model_name_or_path", "dataset_name"}, "docs/from-trl.md"),
    "ms-swift": ({"model", "dataset", "tuner_type"}, "docs/from-ms-swift.md"),
    "Unsloth": ({"model", "training"}, "docs/from-unsloth.md"),
    "LitGPT": ({"checkpoint_dir"}, "docs/from-litgpt.md"),
    "mlx-lm": ({"model", "iters"}, "docs/from-mlx-lm.md"),
    "PEFT": ({"peft_type"}, "docs/from-peft.md"),
    "Soup": ({"base", "task"}, "docs/from-soup.md"),
    "lora": ({"model", "output_dir", "data"}, "README.md"),
}
_REQUIRED = {"model.path": "model", "data.train": "train.jsonl", "output_dir": "runs/first"}


def convert(path: Path, written: Path, processes: int = 1) -> ConversionReport:
    """Write another program's config as one of ours. Raises ConfigError, SurroundingsError."""
    source = Source(
        {key: _printable(key, value) for key, value in config_file.read(path).values.items()}, path, processes
    )
    peer = recognise(source)
    place = {key: index for index, key in enumerate(source.values)}
    outcomes, problems = _accepted(list(_agreed(_outcomes(peer, source))))
    outcomes.sort(key=lambda one: place.get("" if isinstance(one, Unsaid) else one.key.split("[")[0], len(place)))
    report = ConversionReport(
        written,
        path,
        peer.name,
        [outcome for outcome in outcomes if isinstance(outcome, Taken)],
        [outcome for outcome in outcomes if isinstance(outcome, Unsaid)],
        [outcome for outcome in outcomes if isinstance(outcome, NotNeeded)],
        [*problems, *(outcome for outcome in outcomes if isinstance(outcome, NotPossible))],
    )
    init.write(written, config_text.with_schema(text(report)))
    return report


def _printable(key: str, value: Any) -> Any:
    """Return a value without secrets, one whose key names one hidden whole; what JSON has no number for is text."""
    if isinstance(value, dict):
        return {str(name): _printable(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_printable(key, inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return dump_inline(value)
    if isinstance(value, str):
        return HIDDEN if _SECRET.search(key) and value else redact(value)
    return value


def recognise(source: Source) -> Peer:
    """Return whose config this is, by its keys. Raises ConfigError where that is not certain."""
    keys = source.values.keys()
    found = [peer for peer in PEERS if peer.must_have in keys and peer.marks & keys]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{peer.name} ({peer.must_have}, and {', '.join(sorted(peer.marks))})" for peer in PEERS)
    other = next((name for name, (marks, _) in _OTHERS.items() if marks <= keys), None)
    if found:
        what = f"has keys of {' and of '.join(peer.name for peer in found)}; take those of one out"
    elif other == "lora":
        what = "is a config of this program already; `lora check` reads it"
    elif other:
        what = f"looks like {other}'s, which is not converted; {_OTHERS[other][1]} says its keys in our words"
    else:
        what = f"is of no program that is known by its keys ({shown(', '.join(keys), 200)})"
    raise ConfigError(f"{source.path}: this config {what}. Converted are those of {known}.")


def _outcomes(peer: Peer, source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of every key: what its rule says, or its table."""
    found = [outcome for rule in peer.rules for outcome in rule.convert(source)]
    yield from found
    done = {outcome.key.split("[")[0] for outcome in found if not isinstance(outcome, Unsaid)}
    for key, value in source.values.items():
        if key not in done:
            yield _by_table(peer, key, value)


def _by_table(peer: Peer, key: str, value: Any) -> Outcome:
    """Return what becomes of a key that no rule spoke of."""
    if key in peer.same and value is not None:
        return Taken(key, value, peer.same[key], value)
    if key in peer.fixed and value is not None:
        return peer.fixed[key].outcome(key, value)
    if is_off(value):
        return NotNeeded(key, value, "is off there" if value is False else "says nothing")
    if why := reason_for(key, peer.not_needed):
        return NotNeeded(key, value, why)
    if why := reason_for(key, peer.not_possible):
        return NotPossible(key, value, why, False)
    unknown = "is not known here; see whether it changes what is trained"
    return NotPossible(key, value, reason_for(key, peer.other_training) or unknown, True)


def _agreed(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Iterate over outcomes of which no two set one key to different values: what is said first decides."""
    kept = list(outcomes)
    first: dict[str, Taken] = {}
    for one in kept:
        if isinstance(one, Taken):
            first.setdefault(one.ours, one)
    for one in kept:
        if isinstance(one, Taken) and one.our_value != first[one.ours].our_value:
            yield NotPossible(one.key, one.value, f"contradicts {first[one.ours].key}", True)
        elif not isinstance(one, Unsaid) or one.ours not in first:
            yield one


def settings(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the value of each key that is set here, by its dotted name."""
    return {one.ours: one.our_value for one in outcomes if isinstance(one, Taken | Unsaid)}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as sections; `data.train[0].path` is an entry of a list."""
    sources: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key.startswith("data.train["):
            place, _, name = key.rpartition(".")
            sources.setdefault(place, {})[name] = value
    listed = {"data.train": list(sources.values())} if sources else {}
    return config_text.nested({key: value for key, value in values.items() if "[" not in key} | listed)


def _accepted(outcomes: list[Outcome]) -> tuple[list[Outcome], list[NotPossible]]:
    """Return what our own checks accept, and what they refuse with their reasons."""
    problems: list[NotPossible] = []
    quiet = {key for key, rule in rules(RunConfig) if rule in (OnResume.FREE, OnResume.NOTED)}
    while True:
        present = {one.ours.split("[")[0] for one in outcomes if isinstance(one, Taken | Unsaid)}
        outcomes += [
            Unsaid(key, value, "is not said there; put yours here")
            for key, value in _REQUIRED.items()
            if key not in present
        ]
        refused = config_file.refused(nested(settings(outcomes)))
        wrong = [one for one in outcomes if isinstance(one, Taken | Unsaid) and _reason(one.ours, refused)]
        if not wrong:
            return outcomes, problems
        problems += [
            NotPossible(one.key, one.value, str(_reason(one.ours, refused)), one.ours not in quiet)
            for one in wrong
            if isinstance(one, Taken)
        ]
        outcomes = [one for one in outcomes if one not in wrong]


def _reason(key: str, refused: Mapping[str, str]) -> str | None:
    """Return why a key is refused; what is wrong with the whole list of sources is wrong with each of them."""
    dotted, whole = re.sub(r"\[(\d+)\]", r".\1", key), key.split("[")[0]
    return next((why for name, why in refused.items() if name == whole or f"{name}.".startswith(f"{dotted}.")), None)


# --- the file ---


def text(report: ConversionReport) -> str:
    """Return the config as YAML: at the head what is lost, behind each key where its value comes from."""
    lines = [
        f"# Converted from {shown(report.source.name)}, a config of {report.program}: behind each key is its origin."
    ]
    quiet = [left for left in report.not_possible if not left.changes_training]
    for head, lost in (
        ("NOT POSSIBLE HERE, AND WITHOUT IT SOMETHING ELSE IS TRAINED", report.other_training),
        ("Not possible here", quiet),
    ):
        if lost:
            lines += [f"# {head}:", *(_comment(f"  {said(left.key, left.value)} - {left.why}") for left in lost)]
    values = settings([*report.unsaid, *report.taken])
    above: list[str] = []
    for key in sorted(values, key=_place):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                lines += _opened(sections[:depth], section)
        first = sections[-1:] and sections[-1].endswith("]") and above != sections
        indent = "  " * len(sections) + ("  " if sections[-1:] and sections[-1].endswith("]") else "")
        head = f"{indent[:-2]}- {name}" if first else f"{indent}{name}"
        lines.append(f"{head}: {dump_inline(values[key])}".ljust(34) + f" {_comment(_origin(report, key))}")
        above = sections
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return a comment; whatever their keys hold, it ends with its line."""
    return f"# {one_line(text)}"


_ORDER = {key: place for place, (key, _) in enumerate(rules(RunConfig))}


def _place(key: str) -> tuple[int, int, bool]:
    """Return where a key stands: as in the schema; sources of a list one after another, their paths first."""
    base, _, rest = key.partition("[")
    index, _, name = rest.partition("].")
    return _ORDER[base], int(index or 0), name != "path"


def _opened(outer: Sequence[str], section: str) -> list[str]:
    """Return the line that opens a section; the entries of a list are opened by the list alone."""
    name, _, index = section.partition("[")
    return [f"{'  ' * len(outer)}{name}:"] if index in ("", "0]") else []


def _origin(report: ConversionReport, key: str) -> str:
    """Return where the value of a key comes from."""
    taken = [one for one in report.taken if one.ours == key]
    differs = dict.fromkeys(one.differs for one in taken if one.differs)
    origins = [said(one.key, one.value) for one in taken] or [one.why for one in report.unsaid if one.ours == key]
    return ", ".join(origins) + "".join(f"; {one}" for one in differs)
