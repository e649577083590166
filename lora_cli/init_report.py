"""What `lora init` saw of data, model and machine, and what it decided from that, as plain frozen records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.records import DataCounts


@dataclass(frozen=True)
class DataFacts:
    """The training data; null is what only a tokenizer can tell."""

    formats: Sequence[str]
    rows: int
    prompts: int | None  # different ones
    longest: int  # in tokens where there are counts, else in characters
    counts: DataCounts | None
    settings: Mapping[str, Any]  # without which these rows cannot be read: dotted key -> value
    reasons: Mapping[str, str]  # of the settings


@dataclass(frozen=True)
class ModelFacts:
    """The base model, from its config.json and tokenizer; no weight is read."""

    model_type: str
    parameters: int
    width: int
    usual_rate: float  # around which train.learning_rate: auto looks
    positions: int | None
    chat_template: bool
    weights: bool  # are here


@dataclass(frozen=True)
class Fit:
    """What training takes on this machine under some settings, in bytes."""

    settings: Mapping[str, Any]
    length: int  # of the longest sequence that is trained on
    longer: int  # sequences that are longer
    total: int
    free: int | None
    fits: bool | None


@dataclass(frozen=True)
class MachineFacts:
    """This machine. `fits` are ways to train this model on this data, in the order to be tried; the last one is it."""

    device: str
    devices: int
    processors: int
    free: int | None  # bytes, on the device
    fits: Sequence[Fit]


@dataclass(frozen=True)
class Survey:
    """All that was seen; null is what is not here."""

    data: DataFacts | None
    model: ModelFacts | None
    machine: MachineFacts | None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Decision:
    """A key whose value was chosen for this data, model and machine, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class InitReport:
    """The config that was written, and what it rests on."""

    config: Path
    schema: Path
    recipe: str | None
    seen: Survey
    decisions: Sequence[Decision]
    warnings: Sequence[str]
    next: Sequence[str]
