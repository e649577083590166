"""Everything a run needs to know before a weight is read: rows, tokenizer, examples, the layers to adapt."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora_cli import examples, lora, model
from lora_cli.config import RunConfig
from lora_cli.data import Conversation
from lora_cli.examples import Example
from lora_cli.model import ModelHeader
from lora_cli.records import DataCounts


@dataclass(frozen=True)
class Prepared:
    """A run that is known to be possible."""

    header: ModelHeader
    skeleton: nn.Module  # on torch's meta device
    targets: Sequence[str]  # paths of the layers to adapt
    train: Sequence[Example]
    validation: Sequence[Example]
    train_counts: DataCounts
    validation_counts: DataCounts | None
    notices: Sequence[str]


def prepare(config: RunConfig, rows: tuple[Sequence[Conversation], Sequence[Conversation]]) -> Prepared:
    """Check the training and validation rows against the tokenizer, and the targets against the model's structure.

    The rows come from `data.read_split`, which needs no torch. Raises what is wrong with any of them.
    """
    train_rows, validation_rows = rows
    header = model.read_header(config.model)
    train, train_counts = examples.build(train_rows, header.tokenizer, config.data, header.max_positions)
    validation: list[Example] = []
    validation_counts = None
    if validation_rows:
        validation, validation_counts = examples.build(
            validation_rows, header.tokenizer, config.data, header.max_positions
        )
    skeleton = model.build_skeleton(header, config.model.trust_remote_code)
    targets = lora.find_targets(skeleton, config.lora.target_modules)
    return Prepared(
        header,
        skeleton,
        targets,
        train,
        validation,
        train_counts,
        validation_counts,
        list(_notices(skeleton, targets, config, train_counts, validation_counts)),
    )


def _notices(
    skeleton: nn.Module,
    targets: Sequence[str],
    config: RunConfig,
    train: DataCounts,
    validation: DataCounts | None,
) -> Sequence[str]:
    found = []
    for name, counts in (("train", train), ("validation", validation)):
        if counts and (counts.dropped or counts.truncated):
            found.append(
                f"{name}: {counts.dropped} sequences dropped and {counts.truncated} cut as too long; "
                f"{counts.lost_targets} answer tokens lost."
            )
    if config.lora.target_modules == "all-linear":
        stacked = [name for name, p in skeleton.named_parameters() if p.ndim == 3 and ".experts." in name]
        if stacked:
            found.append(
                f"The experts of this model ({len(stacked)} stacked weights) are not adapted, only its linear layers."
            )
    shapes = (lora.linear_shape(skeleton.get_submodule(path)) for path in targets)
    if config.lora.rank > (smallest := min(min(shape) for shape in shapes)):
        found.append(
            f"lora.rank {config.lora.rank} is larger than the smallest adapted layer ({smallest}); it is wasted there."
        )
    if validation is None and config.train.early_stopping.patience:
        found.append("Without validation data there is no early stopping; the last adapter is kept.")
    return found


def data_fingerprint(prepared: Prepared) -> str:
    """Return a hash of every token and target a run sees: data, tokenizer, template and split are in it."""
    digest = hashlib.sha256()
    for examples_of in (prepared.train, prepared.validation):
        for example in examples_of:
            count = len(example)
            digest.update(struct.pack(f"<q{count}q{count}q", count, *example.input_ids, *example.labels))
        digest.update(b"|")
    return digest.hexdigest()[:32]
