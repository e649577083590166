"""The data of a config, for one model: its sources as sequences of tokens, ready to be split, fitted and mixed."""

import contextlib
import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from lora_cli import data, dataset
from lora_cli.chat_template import CHOICES, choose
from lora_cli.conversation import RowError
from lora_cli.corpus import Corpus, make
from lora_cli.data_config import HELD_OUT, DataConfig, HeldOut, SourceConfig
from lora_cli.dataset import Dataset
from lora_cli.errors import NOTHING_LOADED, DataError, ModelError
from lora_cli.examples import Encoder
from lora_cli.model import ModelHeader
from lora_cli.records import DataCounts, Notice, Preparing
from lora_cli.redact import redact

News = Notice | Preparing
Result = TypeVar("Result")
_LOOKED_AT = 64  # rows of each file


@dataclass(frozen=True)
class Sets:
    """The sequences of a run by what they are for, uncut; and each source's (weight, number of files)."""

    train: Dataset
    weights: list[tuple[float, int]]
    validation: Dataset | None
    test: Dataset | None


class DataReader:
    """Reads the data of one config for one model: its tokenizer, its chat template, its number of positions."""

    def __init__(self, config: DataConfig, header: ModelHeader) -> None:
        """Choose the chat template. Raises ConfigError."""
        tokenizer = header.tokenizer
        self.config = config
        self.template = choose(config.chat_template, tokenizer, config.template_date, config.merge_system)
        self.encoder = Encoder(tokenizer, self.template, config.allow_control_tokens is True, header.vocabulary)
        self.max_positions = header.max_positions
        self.limit = min(config.max_length, header.max_positions or config.max_length)

    def corpora(self, source: SourceConfig, group_field: str | None = None) -> Generator[News, None, list[Corpus]]:
        """Return the files of a source as tokens. Raises DataError, ModelError, SurroundingsError."""
        found = []
        for reader in data.readers(source, group_field):
            templated = reader.format in data.TEMPLATED
            if templated and self.template is None:
                raise ModelError(
                    f"{reader.file.name}: holds conversations, but the model's tokenizer has no chat template. Use "
                    f"the instruct version of the model, or name one ({CHOICES}), or write the rows as prompt and "
                    "completion.",
                    state=NOTHING_LOADED,
                )
            if not templated and self.encoder.tokenizer.eos_token_id is None:
                raise ModelError(
                    "The model's tokenizer has no end token, so answers could not end: name it as eos_token in "
                    "tokenizer_config.json.",
                    state=NOTHING_LOADED,
                )
            corpus = yield from make(reader, self.encoder)
            self._require_decided(corpus, templated)
            found.append(corpus)
        return found

    def held_out(self, source: SourceConfig) -> Generator[News, None, tuple[Dataset, DataCounts]]:
        """Return all of a source, cut to length, and what was counted. Raises as `corpora`."""
        corpora = yield from self.corpora(source)
        return self.fit(dataset.whole(corpora, self.limit))

    def fit(self, whole: Dataset) -> tuple[Dataset, DataCounts]:
        """Apply `data.max_length`. Raises DataError."""
        return dataset.fit(whole, self.config, self.max_positions)

    def sets(self, seed: int) -> Generator[News, None, Sets]:
        """Return the sequences of a run by what they are for, split by `seed` where no file is named."""
        corpora: list[Corpus] = []
        weights: list[tuple[float, int]] = []
        for source in self.config.sources:
            more = yield from self.corpora(source, self.config.group_field)
            corpora += more
            weights.append((source.weight, len(more)))
        train = dataset.whole(corpora, self.limit)
        held_out: dict[HeldOut, Dataset | None] = {}
        for name in HELD_OUT:
            if (source_of_it := data.held_out_source(self.config, name)) is not None:
                held_out[name] = dataset.whole((yield from self.corpora(source_of_it)), self.limit)
            else:
                train, held_out[name] = dataset.split(train, self.config, seed, name)
        return Sets(train, weights, held_out["validation"], held_out["test"])

    def _require_decided(self, corpus: Corpus, templated: bool) -> None:
        """Raise DataError where most plain rows hold control tokens and nobody said what they are."""
        share = float((corpus.controls > 0).mean())
        if not templated and share > 0.5 and self.config.allow_control_tokens is None:
            raise DataError(
                f"{corpus.file.name}: {share:.0%} of its rows hold control tokens of the model, as rows do to which a "
                "chat template was already applied. Set data.allow_control_tokens: true if they are meant as control "
                "tokens, or false if they are text.",
                state=NOTHING_LOADED,
            )


def shared_system(config: DataConfig) -> str | None:
    """Return the system message that the first rows of every training file have; None where they have none or several.

    One that holds what looks like a secret is none.
    """
    found = set[str | None]()
    for reader in (reader for source in config.sources for reader in data.readers(source)):
        rows = (row for block in reader.file.blocks() for row in block.rows())
        for number, row in itertools.islice(rows, _LOOKED_AT):
            with contextlib.suppress(RowError):  # it is reported with its place elsewhere
                first = reader.convert(row, number).messages[0]
                found.add(first.content if first.role == "system" else None)
        if len(found) > 1:
            return None
    system = found.pop() if found else None
    return None if system is None or redact(system) != system else system


def run_to_end(generator: Generator[object, None, Result]) -> Result:
    """Return what a generator returns; its news are not wanted."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            result: Result = end.value
            return result


def held_out_of(
    config: DataConfig, seed: int, header: ModelHeader
) -> Generator[News, None, tuple[Dataset, DataCounts, str]]:
    """Return what a run holds out, what was counted, and its name: test rows, else validation rows, else the training
    rows.
    """
    reader = DataReader(config, header)
    sets = yield from reader.sets(seed)
    name = "test" if sets.test else "validation" if sets.validation else "training"
    return *reader.fit(sets.test or sets.validation or sets.train), name
