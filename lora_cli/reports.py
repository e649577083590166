"""What commands report, as plain frozen records: check, eval, scale, merge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_cli.records import DataCounts, Estimate, Forgetting, Overlap


@dataclass(frozen=True)
class Marked:
    """A piece of an example's text, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RowPreview:
    """A sequence as the model sees it, cut where it changes between trained and not."""

    row: str
    pieces: Sequence[Marked]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes during training on the device of each process; `total` holds the process itself too."""

    device: str
    processes: int
    tokens: int  # that one forward sees
    base: int
    adapter: int  # or what else is trained: its numbers, gradients and both moments
    activations: int
    in_flight: int  # of a base that is sharded, quantised or trained: what is made whole for a moment
    process: int
    total: int
    free: int | None  # on the device now; null where it is not here
    fits: bool | None


@dataclass(frozen=True)
class CheckReport:
    """What a run would do."""

    train: DataCounts
    validation: DataCounts | None
    test: DataCounts | None
    replay: DataCounts | None
    overlap: Overlap | None
    examples_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    seconds: float | None  # of training, roughly; null where the device is not here, or for several processes
    previews: Sequence[RowPreview]
    modules: dict[str, int]  # last part of the module name -> how many are adapted
    trainable_parameters: int
    total_parameters: int
    memory: MemoryEstimate
    runtimes: Sequence["RuntimeReport"]
    notices: Sequence[str]


@dataclass(frozen=True)
class RuntimeReport:
    """Whether a runtime loads the adapter (null: not known), and how, or why not."""

    name: str
    loads: bool | None
    note: str


Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Comparison:
    """A figure of base and tuned model on the same rows; `difference` is tuned less base, drawn row by row."""

    base: Estimate
    tuned: Estimate
    difference: Estimate
    verdict: Verdict | None  # on the tuned model; null where there is no interval


@dataclass(frozen=True)
class EvalReport:
    """Base and adapter on the same tokens and prompts. `figures` of `targets` tokens and of `answers`."""

    adapter: Path
    data: str
    rows: int
    targets: int
    answers: int
    figures: Mapping[str, Comparison]
    forgetting: Forgetting | None
    tasks: Mapping[str, Comparison]  # of the evaluation harness, as task/metric
    scan: "ScanReport | None"
    samples: Sequence["Sample"]
    saved: Path | None  # where this report lies


@dataclass(frozen=True)
class ScanPoint:
    """The adapter at one gain: loss on the held-out rows, its change from the base's, and forgetting."""

    gain: float
    loss: Estimate
    change: Estimate
    token_accuracy: float
    forgetting: Forgetting


@dataclass(frozen=True)
class ScanReport:
    """What each gain learns and forgets. `best` has the lowest loss, `best_within` among those within the `budget`.

    At the `knee` a little more gain begins to cost more than it brings: the point farthest above the straight line from
    the base to the best.
    """

    points: Sequence[ScanPoint]
    best: float
    knee: float
    budget: float | None
    best_within: float | None


@dataclass(frozen=True)
class ScaleReport:
    """An adapter written with its alpha times `gain`, and what it learned and forgets where that was measured."""

    output: Path
    gain: float
    alpha: float
    point: ScanPoint | None


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, the answer asked for, and what both models said (token for token up to the end token)."""

    row: str
    prompt: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class MergedLayer:
    """A merged weight: its update's size against its own (Frobenius norms), and how much of the update is written.

    `kept` is the written change's projection on the update: 1 where rounding loses nothing on balance, 0 where the
    update vanishes. Null where the update is zero.
    """

    name: str
    relative: float
    kept: float | None


@dataclass(frozen=True)
class Agreement:
    """A merged model, read from disk, against base + adapter at `positions` of real text."""

    positions: int
    largest_logit_difference: float
    largest_logit: float
    effect: float  # the largest logit difference between base and base + adapter
    mean_kl: float  # nats, of base + adapter from the merged model
    top1_agreement: float


@dataclass(frozen=True)
class FromTrained:
    """A merged model against the quantised base + adapter that was trained, at `positions` of real text.

    The losses are on `targets` of them, held-out rows' (0: there are none).
    """

    positions: int
    largest_logit_difference: float
    mean_kl: float
    top1_agreement: float
    targets: int
    loss: float | None
    trained_loss: float | None


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one model, and as a share of the base's, with 95 % intervals over rounds."""

    prompt: Estimate  # read at once
    answer: Estimate  # one after the other
    prompt_of_base: Estimate
    answer_of_base: Estimate


@dataclass(frozen=True)
class MergeReport:
    """A merged model, reloaded from disk and compared with base + adapter."""

    output: Path
    adapted_tensors: int
    dtype: str
    rounding: str
    layers: Sequence[MergedLayer]
    agreement: Agreement
    bound: float  # of the largest logit difference
    forced: bool  # over the bound, and kept as asked
    quantization: str | None  # of the base that was trained
    onto: str  # of that base, what the update is added to: stored or dequantised
    from_trained: Mapping[str, FromTrained] | None  # by both, of a quantised base that can be read layer by layer
    speeds: Mapping[str, Speed] | None  # of base, base + adapter, merged


@dataclass(frozen=True)
class CombineReport:
    """One adapter made of several. `kept` is the smallest share of a layer's update (sum of squares) that it holds."""

    output: Path
    adapted_tensors: int
    rank: int
    kept: float


@dataclass(frozen=True)
class GgufReport:
    """A GGUF file, and what was compared after it was read back."""

    format: str
    output: Path
    kind: str  # how its matrices are stored
    bytes: int
    tensors: int
    values: int  # numbers in them
    metadata: int  # keys
    largest_error: float  # by rounding, in units of the weights
    notes: Sequence[str]


@dataclass(frozen=True)
class ExportReport:
    """What was written for another runtime, and what to know of it."""

    format: str
    output: Path
    notes: Sequence[str]
