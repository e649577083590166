"""What happened, as plain frozen records of numbers and paths; one JSON line each.

The loop yields them, `run_dir` appends the measurements to metrics.jsonl, `console` draws them.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataCounts:
    """What the data stage found in one set. `targets` are trained tokens; lengths are in tokens."""

    rows: int  # rows read
    examples: int  # sequences they make
    tokens: int  # in all of them
    targets: int  # trained tokens among them
    dropped: int  # examples left out because they were too long, or kept no target
    truncated: int  # examples cut at data.max_length
    lost_targets: int  # trained tokens cut away with them
    too_long: Sequence[str]  # the first of the rows that were too long
    length_percentiles: Sequence[int]  # 50, 90, 99, 100
    target_percentiles: Sequence[int]  # the same of the trained tokens
    length_histogram: Sequence[int]  # sequences in equal steps of length, from 0 to the longest
    duplicates: int  # rows that stand there already
    control_rows: int  # rows with control tokens in their content
    control_tokens: int  # how many those are
    lossy: int  # sequences whose answers the tokenizer does not spell letter for letter
    blank: int  # rows with a question of white space
    without_tools: int  # rows whose tools the chat template leaves out
    secrets: int  # rows with what looks like a key or a password
    sources: Sequence["SourceCounts"]  # one a file


@dataclass(frozen=True)
class SourceCounts:
    """What one file gave to a set."""

    name: str  # its path
    format: str  # how its rows were read
    rows: int  # rows read
    examples: int  # sequences they make
    unread: Sequence[str]  # columns that nothing reads


@dataclass(frozen=True)
class Overlap:
    """How many validation rows are also trained on."""

    rows: int  # rows that are trained on whole
    prompts: int  # rows whose prompt is trained on
    of: int  # validation rows
    places: Sequence[str]  # of the first three


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval, from `n` units (rows that share a prompt are one).

    All are null where there was nothing to measure; only the interval is where one unit was.
    """

    value: float | None  # the figure
    low: float | None  # lower end of its 95 % interval
    high: float | None  # upper end of it
    n: int  # units it is from


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


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats a token."""
    return math.exp(min(loss, 700.0))  # more would be no float


def gigabytes(count: int) -> str:
    """Return bytes as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class Forgetting:
    """How far the tuned model is from the base, in nats a token."""

    rise: Estimate  # of the loss on general text
    base_loss: float  # the base's loss there
    tokens: int  # targets of the general text
    kl: Estimate  # KL(base || tuned) on validation rows
    kl_tokens: int  # targets it is from


@dataclass(frozen=True)
class Started:
    """The loop is about to take its first step, or the first one after a resume; `before` was measured until then."""

    step: int  # the last that is done
    total_steps: int  # optimizer steps of the whole run
    steps_per_epoch: int  # of one pass over the rows
    train: DataCounts  # the rows that are trained on
    validation: DataCounts | None  # those held out; null: none
    trainable_parameters: int  # numbers that are trained
    total_parameters: int  # numbers of the whole model
    forward: str  # how a forward pass is laid out, in words
    patience: int | None  # evaluations without improvement after which the run stops
    forgetting_budget: float | None
    before: Sequence["StepDone | Evaluated"]


@dataclass(frozen=True)
class StepDone:
    """One optimizer update."""

    step: int  # its number, from 1 on
    epoch: float  # passes over the rows so far
    loss: float  # mean over the step's targets, nats
    kl: float | None  # mean of KL(base || tuned), where it is minimised too
    targets: int  # trained tokens of the step
    tokens: int  # all tokens of the step
    learning_rate: float  # at this step
    grad_norm: float  # of all gradients, before clipping
    seconds: float  # wall time of the step


@dataclass(frozen=True)
class Evaluated:
    """One validation pass. At step 0 it measures the base."""

    step: int  # after so many steps; 0 is the base
    epoch: float  # passes over the rows so far
    loss: float  # mean over all validation targets, nats
    targets: int  # trained tokens of the validation rows
    token_accuracy: float  # share of targets that are the model's first choice
    improved: bool  # whether it is the best so far
    best_step: int | None  # the best so far; null: none yet
    patience_left: int | None  # evaluations left without improvement; null: no early stopping
    seconds: float  # wall time of the pass
    forgetting: Forgetting | None  # distance from the base; null: not measured
    within_budget: bool | None  # eval.forgetting_budget; null: there is none


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk, verified."""

    step: int  # its step
    path: Path  # its folder
    is_best: bool  # whether it is the best so far


@dataclass(frozen=True)
class Tested:
    """The best adapter on the test rows, which chose nothing."""

    targets: int  # trained tokens of the test rows
    base_loss: float  # the base's loss there
    loss: float  # the best adapter's
    change: Estimate  # of the loss, from the base's
    flattery: Estimate  # what choosing made of validation: the change there less the change here


@dataclass(frozen=True)
class Finished:
    """The run is over and `adapter` holds the best adapter (the last one where there is no validation)."""

    step: int  # the last step
    best_step: int | None  # whose adapter is kept; null: there is no validation
    best_loss: float | None  # its validation loss
    base_loss: float | None  # the base's validation loss
    best_forgetting: float | None  # its rise of loss on general text; null: not measured
    within_budget: bool | None  # whether that is within eval.forgetting_budget; null: there is none
    test: Tested | None  # the best on the test rows; null: there are none
    reason: str  # why the run ended
    adapter: Path  # where the result lies: adapter/, or model/ of full fine-tuning


@dataclass(frozen=True)
class Probed:
    """A learning rate was tried: the validation loss after so many steps, null where training stopped before."""

    rate: float  # the learning rate
    loss: float | None  # validation loss; null: training stopped
    steps: int  # steps it was tried for


@dataclass(frozen=True)
class TrialEnded:
    """One run of a search: finished, pruned (given up, behind the others), or diverged (stopped: not finite)."""

    number: int  # of the trial, from 0 on
    values: Mapping[str, Any]  # what it tried, by dotted keys
    state: str  # finished | pruned | diverged
    loss: float | None  # best validation loss, or the last one known where it was given up
    forgetting: float | None  # rise of loss on general text; null: not measured
    excess: float  # what it forgets over the budget
    steps: int  # steps taken
    of_steps: int  # steps it was to take
    tokens: int  # tokens seen in them
    seconds: float  # wall time of all of it
    training: float  # of these, in steps and validation


@dataclass(frozen=True)
class Start:
    """What was known of a run before its first step: each set of rows, what the user was told, where values came from.

    `origins` are by dotted keys of the config; empty where that is not known. `system` is the system message of the
    rows, where the first ones share one.
    """

    total_steps: int
    trainable_parameters: int
    total_parameters: int
    data: Mapping[str, DataCounts]
    notices: Sequence[str]
    origins: Mapping[str, str]
    system: str | None = None


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one sentence; without `warns` it is only news."""

    text: str  # the sentence
    warns: bool = True  # false: it is only news


@dataclass(frozen=True)
class Preparing:
    """A large file is being turned into tokens."""

    source: str  # the file
    rows: int  # rows done
    done: float  # as a share of the file
    seconds: float  # since it began


Event = Preparing | Probed | TrialEnded | Started | StepDone | Evaluated | Saved | Finished | Notice


def event_name(record: object) -> str:
    """Return a record's name in metrics.jsonl: StepDone -> step, Evaluated -> evaluated."""
    return _name_of(type(record).__name__)


@functools.cache
def _name_of(kind: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Done")).lower()


def plain(value: Any) -> Any:
    """Return records and values as JSON and YAML have them, paths as text."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return as_json(value) if is_dataclass(value) else value


def as_json(record: Any) -> dict[str, Any]:
    """Return a record as plain JSON values, paths as text."""
    return {field.name: plain(getattr(record, field.name)) for field in fields(record)}
