"""What a user should know of a run before it starts, in sentences with numbers: none of it stops the run."""

from collections.abc import Iterator, Sequence

from torch import nn

from lora_cli import remote_code
from lora_cli.chat_template import ChatTemplate, begins_with_bos
from lora_cli.config import RunConfig
from lora_cli.dataset import Dataset, TrainingSet
from lora_cli.ends import configured_ends
from lora_cli.lora_linear import linear_shape
from lora_cli.model import ModelHeader
from lora_cli.optim import start_rate
from lora_cli.prepare import Prepared
from lora_cli.records import DataCounts, Overlap

_FAR = 6  # times the rate that a model's width gives: at a sixth of it runs end 2 % behind, at six times many diverge
_FEW_ROWS, _MANY_EPOCHS = 2000, 3


def of(prepared: Prepared, config: RunConfig) -> Iterator[str]:
    """Iterate over them."""
    header, train = prepared.header, prepared.train
    yield from _of_code(header, config)
    if config.lora.method == "full":
        yield from _of_full(prepared.width, config)
    else:
        yield from _of_adapter(prepared.skeleton, prepared.targets, config)
        yield from _of_capacity(prepared, config)
        yield from _of_rate(prepared.width, config)
    sets = {"train": prepared.train_counts, "validation": prepared.validation_counts}
    sets |= {"test": prepared.test_counts, "replay": prepared.replay_counts}
    for name, counts in sets.items():
        if counts is not None:
            yield from of_data(name, counts)
    yield from _of_sets(train, prepared.overlap, config)
    yield from _of_template(prepared.template, train.examples, header)
    yield from _of_ends(prepared.ends, header)


def _of_capacity(prepared: Prepared, config: RunConfig) -> Iterator[str]:
    """An adapter learns up to about as many targets as it has parameters as well as full fine-tuning does.

    (Schulman 2025, "LoRA Without Regret"; the documentation of Thinking Machines' Tinker.)
    """
    parameters, targets = prepared.trained_parameters(config.lora), prepared.train_counts.targets
    if parameters < targets:
        rank = -(-config.lora.rank * targets // parameters)
        yield (
            f"lora.rank {config.lora.rank}: the adapter has {parameters:,} parameters for {targets:,} trained tokens; "
            f"with fewer parameters than tokens rank can be what limits it, and {rank} would have as many."
        )


def _of_rate(width: int, config: RunConfig) -> Iterator[str]:
    """Say what is far from the usual: in the sweep over 35 models of Tinker's cookbook (alpha 32, rates 4e-5 to 3e-3)
    a sixth of it costs 2 % of the loss, and at six times of it most runs diverge.
    """
    rate = config.train.learning_rate
    if rate == "auto" or config.lora.init == "pissa":
        return
    usual = start_rate(width, config)
    if _FAR > rate / usual > 1 / _FAR:
        return
    what = "low: the run may end long before it has learned" if rate < usual else "high: the run may not settle"
    scale = config.lora.plain_alpha / config.lora.rank
    yield (
        f"train.learning_rate {rate:g} with lora.alpha {config.lora.alpha:g} (scale {scale:.3g}) is {what}; "
        f"for a model of width {width} about {usual:.1g} is usual at this alpha. train.learning_rate: auto tries."
    )


def _of_code(header: ModelHeader, config: RunConfig) -> Iterator[str]:
    if config.model.trust_remote_code and (files := remote_code.hashes(header.folder)):
        named = ", ".join(f"{name} (SHA-256 {digest[:12]})" for name, digest in files.items())
        yield f"model.trust_remote_code: Python code of the model's own is run: {named}."


def _of_full(width: int, config: RunConfig) -> Iterator[str]:
    rate, usual = config.train.learning_rate, start_rate(width, config)
    if rate != "auto" and rate > _FAR * usual:
        yield (
            f"train.learning_rate {rate:g}: full fine-tuning does best at about a tenth of LoRA's rate; for a model of "
            f"width {width} about {usual:.1g} is usual."
        )


def _of_adapter(skeleton: nn.Module, targets: Sequence[str], config: RunConfig) -> Iterator[str]:
    stacked = [name for name, p in skeleton.named_parameters() if p.ndim == 3 and ".experts." in name]
    if stacked and config.lora.target_modules == "all-linear":
        yield f"The experts of this model ({len(stacked)} stacked weights) are not adapted, only its linear layers."
    if stacked and config.model.quantization is not None:
        yield (
            f"model.quantization {config.model.quantization}: the experts of this model ({len(stacked)} stacked "
            "weights) stay as they are, only its linear layers are quantised."
        )
    shapes = (linear_shape(skeleton.get_submodule(path)) for path in targets)
    if config.lora.rank > (smallest := min(min(shape) for shape in shapes)):
        rank = config.lora.rank
        yield f"lora.rank {rank} is larger than the smallest adapted layer ({smallest}); it is wasted there."


def of_data(name: str, counts: DataCounts) -> Iterator[str]:
    """Iterate over what to know of one set of rows."""
    if counts.dropped or counts.truncated:
        yield (
            f"{name}: {counts.dropped} sequences dropped and {counts.truncated} cut as too long; "
            f"{counts.lost_targets} answer tokens lost."
        )
    for source in counts.sources:
        if misspelt := [column for column in source.unread if "did you mean" in column]:
            yield f"{source.name}: a column that is not read: {', '.join(misspelt)}"
    if counts.duplicates:
        yield f"{name}: {counts.duplicates} rows repeat another row."
    if counts.control_tokens:
        yield (
            f"{name}: {counts.control_tokens} control tokens stand inside the content of {counts.control_rows} rows; "
            "data.allow_control_tokens says whether they are taken as text (the default) or as control tokens."
        )
    if counts.blank:
        yield f"{name}: {counts.blank} rows have a question that is only white space."
    if counts.without_tools:
        yield (
            f"{name}: the chat template leaves out the tools of {counts.without_tools} rows; the model learns to call "
            "tools that it is not shown. Write them into the system message, or choose a template that knows tools."
        )
    if counts.secrets:
        yield (
            f"{name}: {counts.secrets} rows hold what looks like a key or a password; a model may repeat what it is "
            "trained on."
        )
    if counts.lossy:
        yield f"{name}: {counts.lossy} answers hold characters that the tokenizer writes differently."


def _of_sets(train: TrainingSet, overlap: Overlap | None, config: RunConfig) -> Iterator[str]:
    if overlap is None and config.train.early_stopping.patience:
        yield "Without validation data there is no early stopping; the last adapter is kept."
    rows, epochs = len(train.examples), config.train.epochs
    if overlap is None and rows < _FEW_ROWS and epochs > _MANY_EPOCHS and config.train.max_steps is None:
        yield (
            f"train.epochs {epochs}: {rows:,} examples are gone through so often, and without validation data nobody "
            f"sees when that makes it worse; more than {_MANY_EPOCHS} seldom help."
        )
    if overlap is not None and overlap.prompts:
        yield f"{overlap.prompts} of {overlap.of} validation rows have a prompt that is trained on (allowed)."
    if config.data.replay and (times := train.mixture.parts[-1].times) > 1:
        yield f"{config.data.replay.path}: the replay rows are seen {times:.1f} times an epoch; more would help."


def _of_template(template: ChatTemplate | None, train: Dataset, header: ModelHeader) -> Iterator[str]:
    bos = header.tokenizer.bos_token_id
    if train.corpora[0].templated and train[0].input_ids[0] != bos and begins_with_bos(header.tokenizer):
        yield (
            f"The chat template writes no {header.tokenizer.decode([bos or 0])}, with which the tokenizer begins plain "
            "text: the model may know no text without it."
        )
    if template is not None and template.writes_date:
        day = f"it is told {template.date} (data.template_date), so that runs repeat"
        if not template.repeats:
            day = "it cannot be told another, so a run cannot be continued on another day"
        yield f"The chat template writes today's date; {day}."


def _of_ends(ends: frozenset[int], header: ModelHeader) -> Iterator[str]:
    """Say where answers end with a token at which generation does not stop."""
    stops = configured_ends(header)
    for token in sorted(ends - stops):
        name, known = (header.tokenizer.decode(ids) for ids in ([token], sorted(stops)))
        yield (
            f"Answers end with {name}, at which this model's generation does not stop by itself (it stops at "
            f"{known or 'nothing'}): name it as eos_token_id in generation_config.json, or when you generate."
        )
