"""What `lora init` looks at: the rows, the model's config and tokenizer, the machine. Nothing is fetched or written."""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_cli import columns, data, dataset, model, notices, quantised
from lora_cli.config import ModelConfig, RunConfig
from lora_cli.config_text import nested
from lora_cli.data_reader import DataReader, News
from lora_cli.dataset import Dataset
from lora_cli.distributed import current_world, free_memory
from lora_cli.errors import DataError, ModelError, SurroundingsError
from lora_cli.init_report import DataFacts, Fit, MachineFacts, ModelFacts, Survey
from lora_cli.memory import estimate_memory
from lora_cli.model import ModelHeader
from lora_cli.optim import start_rate
from lora_cli.parallel import usable_processors

_UNCUT = 1 << 30  # tokens: longer than any sequence
_USUAL = 1024  # tokens of the longest sequence where no row is here
# What makes training fit, in the order to be tried: nothing, what costs time, what costs exactness too.
_WAYS: Sequence[Mapping[str, Any]] = (
    {},
    {"train.activation_checkpointing": True},
    {"train.activation_checkpointing": True, "model.quantization": "nf4"},
)


def survey(path: str | None, train: str | None, missing: Sequence[str]) -> Generator[News, None, Survey]:
    """Look at a model and at training data, as far as they are here; `missing` says what is not.

    Raises DataError with all rows that are wrong. What is wrong with the model is a warning: `lora check` refuses it.
    """
    warnings = list(missing)
    header, facts, rows, known = None, None, None, None
    with _noted(warnings):
        header = model.read_header(ModelConfig(path=path), weights=False) if path else None
    if train is not None:
        facts, rows = yield from _look_at_rows(train, header)
    if facts is not None and facts.counts is not None:
        warnings += notices.of_data("train", facts.counts)
    lengths, fits = rows.lengths if rows is not None else np.array([_USUAL]), []
    device = current_world("auto").device
    with _noted(warnings):
        known = _model_facts(header) if header else None
        fits = list(_fits(header, lengths, device)) if header else []
        quantised.require_installed(fits[-1].settings.get("model.quantization") if fits else None)
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    machine = MachineFacts(device.type, devices, usable_processors(), free_memory(device), fits)
    return Survey(facts, known, machine, warnings)


@contextlib.contextmanager
def _noted(warnings: list[str]) -> Iterator[None]:
    """Go on where a model cannot be used as it is, and say what is wrong with it."""
    try:
        yield
    except (ModelError, SurroundingsError) as error:
        warnings += error.problems


def _config(settings: Mapping[str, Any]) -> RunConfig:
    """Return a config in which what was not settled yet has any name."""
    return RunConfig.model_validate(nested({"model.path": "-", "data.train": "-", "output_dir": "-", **settings}))


# --- rows ---


def _look_at_rows(train: str, header: ModelHeader | None) -> Generator[News, None, tuple[DataFacts, Dataset | None]]:
    """Return what is in the training data, and its sequences where there is a tokenizer. Raises DataError."""
    found = columns.settings_for(train)
    settings, reasons = ({key: each[part] for key, each in found.items()} for part in (0, 1))
    config = _config({"data.train": train, **settings}).data
    readers = data.readers(config.sources[0])
    formats = tuple(dict.fromkeys(reader.format or "" for reader in readers))
    if header is None:
        sizes = [
            sum(len(message.content) for message in row.messages)
            for reader in readers
            for block in reader.file.blocks()
            for row in reader.read(block)[0]
        ]
        return DataFacts(formats, len(sizes), None, max(sizes), None, settings, reasons), None
    first = next(row for block in readers[0].file.blocks() for row in readers[0].read(block)[0])
    if first.templated and not header.tokenizer.chat_template:
        settings["data.chat_template"] = _template_for(header)
        reasons["data.chat_template"] = "the model's tokenizer has none, and the rows are conversations"
    rows, more = yield from _tokens(header, {"data.train": train, **settings})
    settings, reasons = settings | dict.fromkeys(more, True), reasons | more
    _, counts = dataset.fit(rows, config.model_copy(update={"max_length": _UNCUT}), None)
    prompts = len(np.unique(rows.column("prompt_keys")[rows.first_of_rows()]))
    return DataFacts(formats, counts.rows, prompts, int(rows.lengths.max()), counts, settings, reasons), rows


def _template_for(header: ModelHeader) -> str:
    """Return a named template whose marks the tokenizer knows, else the one that needs none."""
    known = header.tokenizer.get_vocab()
    return "chatml" if {"<|im_start|>", "<|im_end|>"} <= known.keys() else "alpaca"


def _tokens(header: ModelHeader, settings: Mapping[str, Any]) -> Generator[News, None, tuple[Dataset, dict[str, str]]]:
    """Return the sequences of all rows, whole, and the switches without which they cannot be read, with reasons."""

    def read(switches: Mapping[str, Any]) -> Generator[News, None, Dataset]:
        config = _config({"data.allow_control_tokens": False, **settings, **switches}).data
        reader = DataReader(config, replace(header, max_positions=None))
        return dataset.whole((yield from reader.corpora(config.sources[0])), _UNCUT)

    reasons: dict[str, str] = {}
    try:
        rows = yield from read({})
    except DataError as error:
        if "system" not in str(error):
            raise
        reasons["data.merge_system"] = "the chat template takes no system message, and rows have one"
        try:
            rows = yield from read({"data.merge_system": True})
        except DataError:
            raise error from None
    share = float((rows.column("controls") > 0).mean())
    if share > 0.5 and not any(corpus.templated for corpus in rows.corpora):
        reasons["data.allow_control_tokens"] = f"{share:.0%} of the rows hold them: a chat template was applied already"
        rows = yield from read({"data.allow_control_tokens": True})
    return rows, reasons


# --- model and machine ---


def _model_facts(header: ModelHeader) -> ModelFacts:
    skeleton = model.build_skeleton(header)
    width = int(header.config.get_text_config().hidden_size)
    return ModelFacts(
        model_type=str(header.config.model_type),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        width=width,
        usual_rate=start_rate(width, _config({})),
        positions=header.max_positions,
        chat_template=bool(header.tokenizer.chat_template),
        weights=bool(list(Path(header.folder).glob("*.safetensors"))),
    )


def _fits(header: ModelHeader, lengths: np.ndarray, device: torch.device) -> Iterator[Fit]:
    """Iterate over ways to train until one fits: with the longest row, in the end without the longest hundredth."""
    most = header.max_positions or _UNCUT
    longest, usual = (min(most, int(np.quantile(lengths, share, method="higher"))) for share in (1.0, 0.99))
    ways = [(way, longest) for way in _WAYS] + ([(_WAYS[-1], usual)] if usual < longest else [])
    for way, length in ways:
        config = _config(way)
        memory = estimate_memory(header, config, length, device, mean=float(np.minimum(lengths, length).mean()))
        yield Fit(way, length, int((lengths > length).sum()), memory.total, memory.free, memory.fits)
        if memory.fits is not False:
            return
