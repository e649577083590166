"""What `lora report` collects of runs and searches, as plain frozen records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.records import DataCounts, Evaluated, Finished, Probed
from lora_cli.reports import EvalReport
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport


@dataclass(frozen=True)
class Curve:
    """One figure over a run: its value after each of some steps, null where it is not known there.

    `tokens` had been read by then. Of many steps those are left that show the same picture, extremes among them.
    """

    steps: Sequence[int]
    tokens: Sequence[int]
    values: Sequence[float | None]


@dataclass(frozen=True)
class Setting:
    """A key of a config, its value as YAML, and where that comes from; null where that was not written down."""

    key: str
    value: str
    is_default: bool
    origin: str | None


@dataclass(frozen=True)
class RunReport:
    """What is known of one run.

    `status` is that of run.json, `total_steps` null where it was not written down; `best` is the evaluation whose
    adapter is kept, `base` that of the base model. `next` are commands. `warnings` are what could not be read.
    """

    name: str
    path: Path
    status: str
    reason: str | None
    step: int
    total_steps: int | None
    tokens: int
    seconds: float
    trainable_parameters: int | None
    total_parameters: int | None
    summary: Sequence[str]
    next: Sequence[str]
    notices: Sequence[str]
    warnings: Sequence[str]
    base: Evaluated | None
    best: Evaluated | None
    finished: Finished | None
    budget: float | None  # of forgetting
    max_grad_norm: float
    curves: Mapping[str, Curve]
    settings: Sequence[Setting]
    changes: Sequence[Mapping[str, Any]]  # of settings, while it ran
    data: Mapping[str, DataCounts]
    evaluations: Sequence[EvalReport]  # the newest first, each with some of its answers
    tried_rates: Sequence[Probed]
    chosen_rate: float | None
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class SearchReport:
    """What `lora tune` left: one of the three kinds of search. `logarithmic` keys were searched in the logarithm."""

    name: str
    path: Path
    logarithmic: Sequence[str]
    tune: TuneReport | None
    sensitivity: SensitivityReport | None
    against_full: AgainstFullReport | None


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs; one value a run, in their order."""

    key: str
    values: Sequence[str]


@dataclass(frozen=True)
class Report:
    """Runs, and searches beside them; `output` is the page that shows them, `metrics` the table, where asked for."""

    runs: Sequence[RunReport]
    searches: Sequence[SearchReport]
    settings: Sequence[Difference]
    surroundings: Sequence[Difference]
    output: Path | None
    metrics: Path | None
