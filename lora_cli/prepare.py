"""Everything a run needs to know before a weight is read: data as tokens, template, the layers to adapt."""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lora_cli import data, dataset, full_folder, lora, model, quantised
from lora_cli.chat_template import ChatTemplate
from lora_cli.config import LoraConfig, RunConfig
from lora_cli.data_reader import DataReader, News, shared_system
from lora_cli.dataset import Dataset, TrainingSet
from lora_cli.errors import ModelError
from lora_cli.examples import IGNORED, Example
from lora_cli.general import read_general
from lora_cli.lora_linear import linear_shape
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
    system: str | None  # the system message of the rows, where they share one

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
    def width(self) -> int:
        """The base's hidden size."""
        return int(self.header.config.get_text_config().hidden_size)

    @property
    def base_parameters(self) -> int:
        """The numbers of the base; tied ones count once."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    def trained_parameters(self, config: LoraConfig) -> int:
        """Return how many numbers are trained."""
        if config.method == "full":
            return self.base_parameters
        shapes = [linear_shape(self.skeleton.get_submodule(path)) for path in self.targets]
        magnitudes = sum(outputs for _, outputs in shapes) if config.method == "dora" else 0
        return sum(config.rank * (inputs + outputs) for inputs, outputs in shapes) + magnitudes

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
        ends=_ends(train),
        system=shared_system(config.data),
    )


def _find_targets(header: ModelHeader, skeleton: nn.Module, config: RunConfig) -> Sequence[str]:
    """Return the layers to adapt. Raises ModelError where that, or writing all weights back, cannot be done."""
    if config.lora.method != "full":
        targets = lora.find_targets(skeleton, config.lora.target_modules)
        _require_singular_vectors(skeleton, targets, config.lora)
        return targets
    if list(header.folder.glob("*.safetensors")):  # a check needs none
        full_folder.names_in(skeleton, header.folder)
    return ()


def _require_singular_vectors(skeleton: nn.Module, targets: Sequence[str], config: LoraConfig) -> None:
    """Raise ModelError where PiSSA would start from more singular vectors than a layer has."""
    fewest, path = min((min(linear_shape(skeleton.get_submodule(path))), path) for path in targets)
    if config.init == "pissa" and config.rank > fewest:
        raise ModelError(
            f"lora.rank: {config.rank} is too large for lora.init: pissa: {path} has {fewest} singular vectors; set a "
            f"rank of at most {fewest}, or lora.target_modules without it."
        )


def _ends(train: Dataset) -> frozenset[int]:
    """Return the tokens that answers end with, one sequence of each file looked at."""
    whole = np.flatnonzero(train.whole_lengths <= train.limit)
    begins = np.searchsorted(whole, np.cumsum([0, *train.sizes[:-1]]))  # of each file, its first sequence that is whole
    return frozenset(train[int(whole[begin])].labels[-1] for begin in begins if begin < len(whole)) - {IGNORED}
