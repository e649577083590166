"""What commands report, as plain frozen records; the comment behind a field is its meaning in docs/json.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_cli.records import DataCounts, Estimate, Forgetting, Overlap


@dataclass(frozen=True)
class Marked:
    """A piece of an example's text, and whether it is trained."""

    text: str  # special tokens spelt out
    trained: bool  # whether the loss is taken on it


@dataclass(frozen=True)
class RowPreview:
    """A sequence as the model sees it, cut where it changes between trained and not."""

    row: str  # file:number
    pieces: Sequence[Marked]  # the whole sequence in order


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes during training on the device of each process."""

    device: str  # cpu, cuda, mps
    processes: int  # that share the run
    tokens: int  # that one forward sees
    forwards: int  # that run at a time, each on some of the threads
    base: int  # its weights
    adapter: int  # or what else is trained: its numbers, gradients and both moments
    activations: int  # what these forwards keep for their backward
    in_flight: int  # of a base that is sharded, quantised or trained: what is made whole for a moment
    process: int  # Python and its libraries, where they share this memory
    total: int  # all of it
    free: int | None  # on the device now; null where it is not here
    fits: bool | None  # whether that is free; null: not known


@dataclass(frozen=True)
class CheckReport:
    """What a run would do."""

    train: DataCounts  # the rows that are trained on
    validation: DataCounts | None  # rows held out to choose the best
    test: DataCounts | None  # rows held out for the final report
    replay: DataCounts | None  # general rows mixed in
    overlap: Overlap | None  # validation rows that are trained on too
    examples_per_epoch: int  # sequences drawn in one pass
    steps_per_epoch: int  # optimizer steps of one pass
    total_steps: int  # of the whole run
    seconds: float | None  # of training, roughly; null where the device is not here, or for several processes
    previews: Sequence[RowPreview]  # rows with the trained part marked
    modules: dict[str, int]  # last part of the module name -> how many are adapted
    trainable_parameters: int  # numbers that are trained
    total_parameters: int  # numbers of the whole model
    memory: MemoryEstimate  # what training takes
    runtimes: Sequence["RuntimeReport"]  # which runtimes load what comes out
    notices: Sequence[str]  # what should be known before it is trained


@dataclass(frozen=True)
class RuntimeReport:
    """Whether a runtime loads the adapter."""

    name: str  # of the runtime
    loads: bool | None  # whether; null: not known
    note: str  # how, or why not


Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Comparison:
    """A figure of base and tuned model on the same rows."""

    base: Estimate  # of the base
    tuned: Estimate  # of base + adapter
    difference: Estimate  # tuned less base, drawn row by row
    verdict: Verdict | None  # on the tuned model; null where there is no interval


@dataclass(frozen=True)
class EvalReport:
    """Base and adapter on the same tokens and prompts."""

    adapter: Path  # what was measured
    data: str  # file of the rows, or which of the run's
    rows: int  # held-out rows
    targets: int  # trained tokens in them
    answers: int  # rows answered by generation
    figures: Mapping[str, Comparison]  # loss, perplexity, token_accuracy, and the metrics
    forgetting: Forgetting | None  # distance from the base; null: not measured
    tasks: Mapping[str, Comparison]  # of the evaluation harness, as task/metric
    scan: "ScanReport | None"  # at other strengths; null: not asked for
    samples: Sequence["Sample"]  # what both models said; with --json the first 20
    saved: Path | None  # where this report lies


@dataclass(frozen=True)
class ScanPoint:
    """The adapter at one gain: loss on the held-out rows, its change from the base's, and forgetting."""

    gain: float  # strength: 0 is the base, 1 the adapter as it is
    loss: Estimate  # on the held-out rows
    change: Estimate  # of it, from the base's
    token_accuracy: float  # share of targets that are the first choice
    forgetting: Forgetting  # distance from the base


@dataclass(frozen=True)
class ScanReport:
    """What each gain learns and forgets.

    At the `knee` a little more gain begins to cost more than it brings: the point farthest above the straight line from
    the base to the best.
    """

    points: Sequence[ScanPoint]  # one a gain
    best: float  # gain with the lowest loss
    knee: float  # gain after which more costs more than it brings
    budget: float | None  # eval.forgetting_budget of the run; null: there is none
    best_within: float | None  # gain with the lowest loss within it; null: no budget, or none within


@dataclass(frozen=True)
class ScaleReport:
    """An adapter written with its alpha times a gain, and what it learned and forgets where that was measured."""

    output: Path  # the adapter's folder
    gain: float  # it was scaled by
    alpha: float  # its lora_alpha now
    point: ScanPoint | None  # what was measured there; null: --gain was given


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, the answer asked for, and what both models said (token for token up to the end token)."""

    row: str  # file:number
    prompt: str  # as the model reads it
    expected: str  # the row's own answer
    base: str  # what the base said
    tuned: str  # what base + adapter said


@dataclass(frozen=True)
class MergedLayer:
    """A merged weight: its update's size against its own (Frobenius norms), and how much of the update is written.

    That is the written change's projection on the update: 1 where rounding loses nothing on balance, 0 where the
    update vanishes.
    """

    name: str  # of the tensor
    relative: float  # size of the update over that of the weight
    kept: float | None  # share of the update that is written; null: it is zero


@dataclass(frozen=True)
class Agreement:
    """A merged model, read from disk, against base + adapter on real text."""

    positions: int  # compared
    largest_logit_difference: float  # from base + adapter
    largest_logit: float  # of base + adapter, in size
    effect: float  # the largest logit difference between base and base + adapter
    mean_kl: float  # nats, of base + adapter from the merged model
    top1_agreement: float  # share of positions with the same first choice


@dataclass(frozen=True)
class FromTrained:
    """A merged model against the quantised base + adapter that was trained, on real text."""

    positions: int  # compared
    largest_logit_difference: float  # from what was trained
    mean_kl: float  # nats, of what was trained from the merged model
    top1_agreement: float  # share of positions with the same first choice
    targets: int  # of held-out rows among them; 0: there are none
    loss: float | None  # of the merged model on those
    trained_loss: float | None  # of what was trained on those


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one model, and as a share of the base's, with 95 % intervals over rounds."""

    prompt: Estimate  # tokens a second, read at once
    answer: Estimate  # tokens a second, written one after the other
    prompt_of_base: Estimate  # the first, as a share of the base's
    answer_of_base: Estimate  # the second, as a share of the base's


@dataclass(frozen=True)
class MergeReport:
    """A merged model, reloaded from disk and compared with base + adapter."""

    output: Path  # the model's folder
    adapted_tensors: int  # that an update was added to
    dtype: str  # the weights are written in
    rounding: str  # nearest | stochastic
    layers: Sequence[MergedLayer]  # one a tensor
    agreement: Agreement  # with base + adapter
    bound: float  # of the largest logit difference
    forced: bool  # over the bound, and kept as asked
    quantization: str | None  # of the base that was trained
    onto: str  # of that base, what the update is added to: stored or dequantised
    from_trained: Mapping[str, FromTrained] | None  # by both, of a quantised base that can be read layer by layer
    speeds: Mapping[str, Speed] | None  # of base, base + adapter, merged; null: not asked for
    pushed: str | None = None  # the hub repository it was uploaded to


@dataclass(frozen=True)
class CombineReport:
    """One adapter made of several."""

    output: Path  # the adapter's folder
    adapted_tensors: int  # layers with an update
    rank: int  # the largest of them
    kept: float  # smallest share of a layer's update (sum of squares) that it holds
    pushed: str | None = None  # the hub repository it was uploaded to


@dataclass(frozen=True)
class GgufReport:
    """A GGUF file, and what was compared after it was read back."""

    format: str  # gguf | gguf-lora | ollama
    output: Path  # the file, or the folder with it
    kind: str  # how its matrices are stored
    bytes: int  # size of the file
    tensors: int  # in it
    values: int  # numbers in them
    metadata: int  # keys
    largest_error: float  # by rounding, in units of the weights
    notes: Sequence[str]  # what to know of it
    pushed: str | None = None  # the hub repository it was uploaded to


@dataclass(frozen=True)
class ExportReport:
    """What was written for another runtime, and what to know of it."""

    format: str  # peft | mlx | onnx
    output: Path  # the folder
    notes: Sequence[str]  # what to know of it
    pushed: str | None = None  # the hub repository it was uploaded to


@dataclass(frozen=True)
class VersionReport:
    """Versions of what makes the numbers."""

    lora: str  # of this program
    torch: str  # of PyTorch
    transformers: str  # of the library with the models


@dataclass(frozen=True)
class Problem:
    """What went wrong, as it stands on stderr too."""

    exit_code: int  # that the process ends with
    problems: Sequence[str]  # sentences: where, what is wrong, the value seen, what is accepted, how to fix it
    state: str  # things are in now


@dataclass(frozen=True)
class ErrorReport:
    """Every command's output where it failed."""

    error: Problem  # in the place of the command's own keys
