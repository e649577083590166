"""What happened, as plain frozen records of numbers and paths; one JSON line each.

The loop yields them, `run_dir` appends the measurements to metrics.jsonl, `console` draws them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataCounts:
    """What the data stage found in one set. `targets` are trained tokens; lengths are in tokens."""

    rows: int
    examples: int
    tokens: int
    targets: int
    dropped: int  # examples left out because they were too long, or kept no target
    truncated: int
    lost_targets: int  # trained tokens cut away with them
    too_long: Sequence[str]  # the first of the rows that were too long
    length_percentiles: Sequence[int]  # 50, 90, 99, 100
    target_percentiles: Sequence[int]  # the same of the trained tokens
    length_histogram: Sequence[int]  # sequences in equal steps of length, from 0 to the longest
    duplicates: int  # rows that stand there already
    control_rows: int  # rows with control tokens in their content
    control_tokens: int
    lossy: int  # sequences whose answers the tokenizer does not spell letter for letter
    blank: int  # rows with a question of white space
    without_tools: int  # rows whose tools the chat template leaves out
    secrets: int  # rows with what looks like a key or a password
    sources: Sequence["SourceCounts"]


@dataclass(frozen=True)
class SourceCounts:
    """What one file gave to a set."""

    name: str
    format: str
    rows: int
    examples: int
    unread: Sequence[str]  # columns that nothing reads


@dataclass(frozen=True)
class Overlap:
    """How many of `of` validation rows are also trained on: whole `rows`, and rows whose `prompts` are."""

    rows: int
    prompts: int
    of: int
    places: Sequence[str]  # of the first three


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval, from `n` units (rows that share a prompt are one).

    All are null where there was nothing to measure; only the interval is where one unit was.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def with_interval(estimate: Estimate, spec: str) -> str:
    """Return "value [low, high]", without what is not known; `spec` is that of a number."""
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, spec)
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def short(value: object) -> str:
    """Return a value of a config in few letters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Forgetting:
    """How far the tuned model is from the base, in nats a token.

    `rise` is of the loss on general text of `tokens` targets, from `base_loss` on; `kl` is KL(base || tuned) on
    `kl_tokens` targets of the validation set.
    """

    rise: Estimate
    base_loss: float
    tokens: int
    kl: Estimate
    kl_tokens: int


@dataclass(frozen=True)
class Started:
    """The loop is about to take its first step (or the first one after a resume)."""

    step: int
    total_steps: int
    steps_per_epoch: int
    train: DataCounts
    validation: DataCounts | None
    trainable_parameters: int
    total_parameters: int
    forward: str  # how a forward pass is laid out, in words


@dataclass(frozen=True)
class StepDone:
    """One optimizer update. `loss` is the mean over the step's `targets`, `kl` that of KL(base || tuned) where it is
    part of what is minimised; `seconds` is wall time.
    """

    step: int
    epoch: float
    loss: float
    kl: float | None
    targets: int
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """One validation pass. At step 0 it measures the base. `within_budget` is null where there is no budget."""

    step: int
    epoch: float
    loss: float
    targets: int
    token_accuracy: float
    improved: bool
    best_step: int | None
    patience_left: int | None
    seconds: float
    forgetting: Forgetting | None
    within_budget: bool | None


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk, verified."""

    step: int
    path: Path
    is_best: bool


@dataclass(frozen=True)
class Tested:
    """The best adapter on the test rows, which chose nothing: the change of loss from the base's there.

    `flattery` is what choosing made of validation: by how much the change of loss was better there than on the test
    rows.
    """

    targets: int
    base_loss: float
    loss: float
    change: Estimate
    flattery: Estimate


@dataclass(frozen=True)
class Finished:
    """The run is over and `adapter` holds the best adapter (the last one where there is no validation).

    `best_forgetting` is its rise of loss on general text, null where that was not measured; `within_budget` says
    whether it is within `eval.forgetting_budget`, where there is one.
    """

    step: int
    best_step: int | None
    best_loss: float | None
    base_loss: float | None
    best_forgetting: float | None
    within_budget: bool | None
    test: Tested | None
    reason: str
    adapter: Path


@dataclass(frozen=True)
class Probed:
    """A learning rate was tried: the validation loss after so many steps, null where training stopped before."""

    rate: float
    loss: float | None
    steps: int


@dataclass(frozen=True)
class TrialEnded:
    """One run of a search. `values` are those that it tried, by dotted keys.

    `state` is finished, pruned (given up, behind the others), or diverged (training stopped: not finite). `loss` is the
    best validation loss, or the last one known of a trial that was given up; `excess` what it forgets over the budget.
    `training` is the part of `seconds` that went into steps and validation.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    loss: float | None
    forgetting: float | None
    excess: float
    steps: int
    of_steps: int
    tokens: int
    seconds: float
    training: float


@dataclass(frozen=True)
class Start:
    """What was known of a run before its first step: each set of rows, what the user was told, where values came from.

    `origins` are by dotted keys of the config; empty where that is not known.
    """

    total_steps: int
    trainable_parameters: int
    total_parameters: int
    data: Mapping[str, DataCounts]
    notices: Sequence[str]
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one sentence."""

    text: str


@dataclass(frozen=True)
class Preparing:
    """A large file is being turned into tokens; `done` is a share."""

    source: str
    rows: int
    done: float
    seconds: float


Event = Preparing | Probed | TrialEnded | Started | StepDone | Evaluated | Saved | Finished | Notice


def event_name(record: object) -> str:
    """Return a record's name in metrics.jsonl: StepDone -> step, Evaluated -> evaluated."""
    name = type(record).__name__.removesuffix("Done")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def as_json(record: Any) -> dict[str, Any]:
    """Return a record as plain JSON values, paths as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return value

    return {key: plain(value) for key, value in asdict(record).items()}
