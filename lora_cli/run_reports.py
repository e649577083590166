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
    """One figure over a run. Of many steps those are left that show the same picture, extremes among them."""

    steps: Sequence[int]  # at which it was measured, and where a gap begins
    tokens: Sequence[int]  # read by then
    values: Sequence[float | None]  # at them; null: not measured there


@dataclass(frozen=True)
class Setting:
    """A key of a run's config."""

    key: str  # dotted
    value: str  # as YAML
    is_default: bool  # whether it is what the key has by itself
    origin: str | None  # where the value comes from; null: that was not written down


@dataclass(frozen=True)
class RunReport:
    """What is known of one run."""

    name: str  # last part of its path; the path where several runs have that
    path: Path  # its folder
    status: str  # of run.json; `not begun` where there is none
    reason: str | None  # why it ended; null: it has not
    step: int  # the last that was measured
    total_steps: int | None  # of the whole run; null: that was not written down
    tokens: int  # seen in training
    seconds: float  # in steps and validation passes
    trainable_parameters: int | None  # numbers that are trained; null: that was not written down
    total_parameters: int | None  # numbers of the whole model; null: that was not written down
    summary: Sequence[str]  # what came of it, in sentences
    next: Sequence[str]  # commands to type
    notices: Sequence[str]  # what the user was told before the first step
    warnings: Sequence[str]  # what could not be read, and why
    base: Evaluated | None  # validation of the base model; null: there is none
    best: Evaluated | None  # validation of the adapter that is kept; null: there is none
    finished: Finished | None  # how it ended; null: it has not finished
    budget: float | None  # eval.forgetting_budget; null: there is none
    max_grad_norm: float  # train.max_grad_norm
    curves: Mapping[str, Curve]  # by the figure's name; one without any value is left out
    settings: Sequence[Setting]  # every key of its config
    changes: Sequence[Mapping[str, Any]]  # of settings, while it ran
    data: Mapping[str, DataCounts]  # what each set holds, by its name
    evaluations: Sequence[EvalReport]  # what `lora eval` found, the newest first, each with some of its answers
    tried_rates: Sequence[Probed]  # for train.learning_rate: auto
    chosen_rate: float | None  # the one of them that was taken; null: none was tried
    environment: Mapping[str, Any]  # environment.json


@dataclass(frozen=True)
class SearchReport:
    """What `lora tune` left: one of its three kinds."""

    name: str  # its path
    path: Path  # its folder
    logarithmic: Sequence[str]  # keys that were searched in the logarithm
    tune: TuneReport | None  # a search; null: it is none of these
    sensitivity: SensitivityReport | None  # `--one-at-a-time`; null: it is not that
    against_full: AgainstFullReport | None  # `--against-full`; null: it is not that


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs."""

    key: str  # of the config, or of environment.json
    values: Sequence[str]  # one a run, in the order of the runs


@dataclass(frozen=True)
class Report:
    """What is known of runs, and of the searches beside them."""

    runs: Sequence[RunReport]  # in the order they were named
    searches: Sequence[SearchReport]  # named, or beside a run
    settings: Sequence[Difference]  # of the configs, where they differ
    surroundings: Sequence[Difference]  # of environment.json, where they differ
    output: Path  # the page that shows all this
    metrics: Path | None  # the table of measurements; null: not asked for
