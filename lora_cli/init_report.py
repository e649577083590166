"""What `lora init` saw of data, model and machine, and what it decided from that, as plain frozen records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.records import DataCounts


@dataclass(frozen=True)
class DataFacts:
    """The training data."""

    formats: Sequence[str]  # of the rows, as data.format has them
    rows: int  # in all files
    prompts: int | None  # different ones; null: there is no tokenizer to tell
    longest: int  # length of a row, in tokens where there are counts, else in characters
    counts: DataCounts | None  # in tokens; null: there is no tokenizer to count with
    settings: Mapping[str, Any]  # without which these rows cannot be read: dotted key -> value
    reasons: Mapping[str, str]  # of the settings


@dataclass(frozen=True)
class ModelFacts:
    """The base model, from its config.json and tokenizer; no weight is read."""

    model_type: str  # of its config.json
    parameters: int  # numbers in it
    width: int  # of its hidden states
    usual_rate: float  # around which train.learning_rate: auto looks
    positions: int | None  # tokens that it takes at most; null: it does not say
    chat_template: bool  # whether its tokenizer has one
    weights: bool  # whether they are here


@dataclass(frozen=True)
class Fit:
    """What training takes on this machine under some settings."""

    settings: Mapping[str, Any]  # dotted key -> value
    length: int  # of the longest sequence that is trained on
    longer: int  # sequences that are longer
    total: int  # bytes that are needed
    free: int | None  # bytes, on the device; null: not known
    fits: bool | None  # whether those are free; null: not known


@dataclass(frozen=True)
class MachineFacts:
    """This machine."""

    device: str  # cpu | cuda | mps
    devices: int  # how many of them
    processors: int  # that this process may use
    free: int | None  # bytes, on the device; null: not known
    fits: Sequence[Fit]  # ways to train this model on this data, in the order they were tried; the last is taken


@dataclass(frozen=True)
class Survey:
    """All that was seen."""

    data: DataFacts | None  # null: it is not here
    model: ModelFacts | None  # null: it is not here
    machine: MachineFacts | None  # null: neither is here, so it was not looked at
    warnings: Sequence[str] = ()  # what is not here, and what to know of the rest


@dataclass(frozen=True)
class Decision:
    """A key whose value was chosen for this data, model and machine."""

    key: str  # dotted
    value: Any  # it gets
    reason: str  # why


@dataclass(frozen=True)
class InitReport:
    """A config that was written, and what it rests on."""

    config: Path  # the file that was written
    schema: Path  # the file beside it that editors check it by
    recipe: str | None  # its name; null: it is not from one
    seen: Survey  # of data, model and machine; nothing for a recipe
    decisions: Sequence[Decision]  # keys that differ from their defaults
    warnings: Sequence[str]  # what to know before training
    next: Sequence[str]  # commands to type


@dataclass(frozen=True)
class RecipeList:
    """The recipes there are; nothing is written."""

    recipes: Mapping[str, str]  # name -> what it is for
