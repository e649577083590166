"""Everything a run needs to know before a weight is read: data as tokens, template, the layers to adapt."""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lora_cli import data, dataset, full_folder, lora, model, quantised, remote_code
from lora_cli.chat_template import ChatTemplate, begins_with_bos
from lora_cli.config import FULL_LEARNING_RATE, LoraConfig, RunConfig
from lora_cli.data_reader import DataReader, News
from lora_cli.dataset import Dataset, TrainingSet
from lora_cli.ends import configured_ends
from lora_cli.examples import IGNORED, Example
from lora_cli.general import read_general
from lora_cli.model import ModelHeader
from lora_cli.records import DataCounts, Overlap


@dataclass(frozen=True)
class Prepared:
    """A run that is known to be possible."""

    header: ModelHeader
    template: ChatTemplate | None
    skeleton: nn.Module  # on torch's meta device
    targets: Sequence[str]  # paths of the layers to adapt; none where all weights are trained
    train: TrainingSet
    validation: Dataset | None
    test: Dataset | None
    general: Sequence[Example] | None  # to measure forgetting on
    train_counts: DataCounts
    validation_counts: DataCounts | None
    test_counts: DataCounts | None
    replay_counts: DataCounts | None
    overlap: Overlap | None
    ends: frozenset[int]  # the tokens that answers end with
    notices: Sequence[str]

    @property
    def templated(self) -> bool:
        """Whether any row goes through the chat template."""
        return any(corpus.templated for corpus in self.train.examples.corpora)

    def data_fingerprint(self) -> str:
        """Return a hash of every token and target a run sees: data, tokenizer, template and split are in it."""
        parts = [self.train.examples.fingerprint(), str(self.train.mixture)]
        parts += [self.validation.fingerprint()] if self.validation else []
        parts += [self.test.fingerprint()] if self.test else []
        parts += [str(example.input_ids) for example in self.general or ()]
        return _hash("|".join(parts))

    def fingerprints(self) -> dict[str, str | None]:
        """Return a hash each of what the tokens come from, so that it can be said which of them changed."""
        tokenizer = self.header.tokenizer
        special = [str(token) for token in tokenizer.all_special_tokens]
        sets = [self.train.examples, *(held_out for held_out in (self.validation, self.test) if held_out)]
        rows = hashlib.sha256()
        for corpus in {id(corpus): corpus for one in sets for corpus in one.corpora}.values():
            rows.update(corpus.row_keys[np.diff(corpus.numbers, prepend=-1) != 0].tobytes())  # once a row
        return {
            "rows": rows.hexdigest()[:32],
            "tokenizer": _hash(tokenizer.backend_tokenizer.to_str() + str(special)),
            "template": _hash(str(self.template)) if self.templated else None,
        }

    @property
    def base_parameters(self) -> int:
        """The numbers of the base; tied ones count once."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    def trained_parameters(self, config: LoraConfig) -> int:
        """Return how many numbers are trained."""
        if config.method == "full":
            return self.base_parameters
        shapes = [lora.linear_shape(self.skeleton.get_submodule(path)) for path in self.targets]
        return sum(config.rank * (inputs + outputs) for inputs, outputs in shapes)

    def total_parameters(self, config: LoraConfig) -> int:
        """Return how many numbers the tuned model has."""
        return self.base_parameters + (0 if config.method == "full" else self.trained_parameters(config))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prepare(config: RunConfig, weights: bool = True) -> Generator[News, None, Prepared]:
    """Turn the data into tokens, and check the targets against the model's structure; `weights` as of `read_header`.

    `data.require_readable` has looked at the data before, without torch. Raises what is wrong with any of them.
    """
    if weights:
        quantised.require_installed(config.model.quantization)
    header = model.read_header(config.model, weights)
    skeleton = model.build_skeleton(header, config.model.trust_remote_code)
    targets = _find_targets(header, skeleton, config)
    reader = DataReader(config.data, header)
    sets = yield from reader.sets(config.seed)
    validation, test, overlap = sets.validation, sets.test, None
    validation_counts = test_counts = replay = replay_counts = None
    if (source := data.replay_source(config.data)) is not None:
        replay, replay_counts = yield from reader.held_out(source)
    trained_on = [sets.train, replay] if replay else [sets.train]
    if validation is not None:
        overlap = dataset.find_overlap(trained_on, validation)
        dataset.require_no_overlap(overlap, config.data, "validation")
    if test is not None:
        dataset.require_no_overlap(dataset.find_overlap(trained_on, test), config.data, "test")
    train, train_counts = reader.fit(sets.train)
    if validation is not None:
        validation, validation_counts = reader.fit(validation)
    if test is not None:
        test, test_counts = reader.fit(test)
    general = (yield from read_general(config.eval, reader)) if validation is not None else None
    ratio = config.data.replay.ratio if config.data.replay else 0.0
    training_set = dataset.mix(train, sets.weights, replay, ratio)
    ends = _ends(train)
    notices = [
        *_code_notices(header, config),
        *(_full_notices(config) if config.lora.method == "full" else _adapter_notices(skeleton, targets, config)),
        *_data_notices("train", train_counts),
        *(_data_notices("validation", validation_counts) if validation_counts else ()),
        *(_data_notices("test", test_counts) if test_counts else ()),
        *(_data_notices("replay", replay_counts) if replay_counts else ()),
        *_set_notices(training_set, overlap, config),
        *_template_notices(reader.template, train, header),
        *_end_notices(ends, header),
    ]
    return Prepared(
        header=header,
        template=reader.template,
        skeleton=skeleton,
        targets=targets,
        train=training_set,
        validation=validation,
        test=test,
        general=general,
        train_counts=train_counts,
        validation_counts=validation_counts,
        test_counts=test_counts,
        replay_counts=replay_counts,
        overlap=overlap,
        ends=ends,
        notices=notices,
    )


def _find_targets(header: ModelHeader, skeleton: nn.Module, config: RunConfig) -> Sequence[str]:
    """Return the layers to adapt. Raises ModelError where that, or writing all weights back, cannot be done."""
    if config.lora.method != "full":
        return lora.find_targets(skeleton, config.lora.target_modules)
    if list(header.folder.glob("*.safetensors")):  # a check needs none
        full_folder.names_in(skeleton, header.folder)
    return ()


# --- what a user should know ---


def _code_notices(header: ModelHeader, config: RunConfig) -> Iterator[str]:
    if config.model.trust_remote_code and (files := remote_code.hashes(header.folder)):
        named = ", ".join(f"{name} (SHA-256 {digest[:12]})" for name, digest in files.items())
        yield f"model.trust_remote_code: Python code of the model's own is run: {named}."


def _full_notices(config: RunConfig) -> Iterator[str]:
    rate = config.train.learning_rate
    if isinstance(rate, float) and rate > 5 * FULL_LEARNING_RATE:
        yield (
            f"train.learning_rate {rate:g}: full fine-tuning does best at about a tenth of LoRA's rate; its default "
            f"is {FULL_LEARNING_RATE:g}."
        )


def _adapter_notices(skeleton: nn.Module, targets: Sequence[str], config: RunConfig) -> Iterator[str]:
    stacked = [name for name, p in skeleton.named_parameters() if p.ndim == 3 and ".experts." in name]
    if stacked and config.lora.target_modules == "all-linear":
        yield f"The experts of this model ({len(stacked)} stacked weights) are not adapted, only its linear layers."
    if stacked and config.model.quantization is not None:
        yield (
            f"model.quantization {config.model.quantization}: the experts of this model ({len(stacked)} stacked "
            "weights) stay as they are, only its linear layers are quantised."
        )
    shapes = (lora.linear_shape(skeleton.get_submodule(path)) for path in targets)
    if config.lora.rank > (smallest := min(min(shape) for shape in shapes)):
        rank = config.lora.rank
        yield f"lora.rank {rank} is larger than the smallest adapted layer ({smallest}); it is wasted there."


def _data_notices(name: str, counts: DataCounts) -> Iterator[str]:
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


def _set_notices(train: TrainingSet, overlap: Overlap | None, config: RunConfig) -> Iterator[str]:
    if overlap is None and config.train.early_stopping.patience:
        yield "Without validation data there is no early stopping; the last adapter is kept."
    if overlap is not None and overlap.prompts:
        yield f"{overlap.prompts} of {overlap.of} validation rows have a prompt that is trained on (allowed)."
    if config.data.replay and (times := train.mixture.parts[-1].times) > 1:
        yield f"{config.data.replay.path}: the replay rows are seen {times:.1f} times an epoch; more would help."


def _template_notices(template: ChatTemplate | None, train: Dataset, header: ModelHeader) -> Iterator[str]:
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


def _ends(train: Dataset) -> frozenset[int]:
    """Return the tokens that answers end with, one sequence of each file looked at."""
    whole = np.flatnonzero(train.whole_lengths <= train.limit)
    begins = np.searchsorted(whole, np.cumsum([0, *train.sizes[:-1]]))  # of each file, its first sequence that is whole
    return frozenset(train[int(whole[begin])].labels[-1] for begin in begins if begin < len(whole)) - {IGNORED}


def _end_notices(ends: frozenset[int], header: ModelHeader) -> Iterator[str]:
    """Say where answers end with a token at which generation does not stop."""
    stops = configured_ends(header)
    for token in sorted(ends - stops):
        name, known = (header.tokenizer.decode(ids) for ids in ([token], sorted(stops)))
        yield (
            f"Answers end with {name}, at which this model's generation does not stop by itself (it stops at "
            f"{known or 'nothing'}): name it as eos_token_id in generation_config.json, or when you generate."
        )
