"""Whether a merged folder does what base + adapter does, on real rows, in float32 on a CPU."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli import model, streamed
from lora_cli.config import ModelConfig
from lora_cli.data_reader import held_out_of, run_to_end
from lora_cli.errors import UserError
from lora_cli.examples import IGNORED, Example
from lora_cli.merged_folder import Form, Merged, Onto, open_weights
from lora_cli.model import ModelHeader
from lora_cli.reports import Agreement, FromTrained
from lora_cli.streamed import CannotStream, Source
from lora_cli.tuned import Result
from lora_cli.update import Update
from lora_cli.weights import Weights

_ROWS, _LONGEST = 4, 128
_OPERATIONS = 1.5e11  # of a pass, so that a large model is compared on fewer tokens
_SENTENCES = (
    "The library opens at nine on weekdays and at ten on Saturdays.",
    "def mean(values):\n    return sum(values) / len(values)",
    "To bake bread you need flour, water, salt and a little patience.",
)


@torch.inference_mode()
def compare(result: Result, update: Update, merged: Path, onto: Onto = "stored") -> Agreement:
    """Run base + update and the merged folder, read from disk, on the same tokens."""
    section = result.base if onto == "dequantised" else result.base.model_copy(update={"quantization": None})
    ids = _probes(result, _tokens(result))
    changed = open_weights(result, model.build_skeleton(result.header, result.base.trust_remote_code), update, onto)
    try:
        open_model = _from_disk
        plain, wanted = streamed.with_and_without(open_model(result.header, section), changed, ids)
    except CannotStream:
        open_model = _loaded
        base = open_model(result.header, section)
        plain = streamed.logits(base, ids)
        with streamed.adding(base, changed):
            wanted = streamed.logits(base, ids)
        del base
    section = result.base.model_copy(update={"path": str(merged), "revision": None, "quantization": None})
    got = streamed.logits(open_model(model.read_header(section), section), ids)
    difference, kl, top1 = _differences(got, wanted)
    return Agreement(
        positions=len(got),
        largest_logit_difference=difference,
        largest_logit=float(wanted.abs().max()),
        effect=float((wanted - plain).abs().max()),
        mean_kl=kl,
        top1_agreement=top1,
    )


@torch.inference_mode()
def from_trained(result: Result, update: Update, form: Form) -> Mapping[str, FromTrained] | None:
    """Compare the merges onto either form of a quantised base with that base + update, as it was trained.

    None where the base was not quantised, or cannot be run layer by layer.
    """
    if result.base.quantization is None:
        return None
    ids, labels, real = _padded(_held_out(result), _tokens(result))
    skeleton = model.build_skeleton(result.header, result.base.trust_remote_code)

    def logits(source: Source, changed: Weights | None = None) -> Tensor:
        module = streamed.open_model(result.header, source, result.base.trust_remote_code)
        with streamed.adding(module, changed) if changed else contextlib.nullcontext():
            return streamed.logits(module, ids)[real]  # [N, V]

    try:
        base = open_weights(result, skeleton, update, "dequantised")
        trained = logits(base, base)
        found = {}
        for onto in get_args(Onto):
            got = logits(Merged(open_weights(result, skeleton, update, onto), form))
            losses = [_loss(each, labels[real]) for each in (got, trained)]
            found[onto] = FromTrained(len(got), *_differences(got, trained), _count(labels), *losses)
    except CannotStream:
        return None
    return found


def _differences(got: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Return the largest difference of logits [N, V], their mean KL, and how often both have the same first choice."""
    kl = F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum") / len(got)
    same = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
    return float((got - wanted).abs().max()), max(0.0, float(kl)), float(same)


def _loss(logits: Tensor, labels: Tensor) -> float | None:
    """Return the mean loss of logits [N, V] at the labels [N] that are there."""
    return float(F.cross_entropy(logits, labels, ignore_index=IGNORED)) if _count(labels) else None


def _count(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def _from_disk(header: ModelHeader, section: ModelConfig) -> nn.Module:
    """Return a model that reads its weights as it runs. Raises CannotStream."""
    skeleton = model.build_skeleton(header, section.trust_remote_code)
    weights = Weights(header.folder, skeleton, None, section.quantization)
    return streamed.open_model(header, weights, section.trust_remote_code)


def _loaded(header: ModelHeader, section: ModelConfig) -> nn.Module:
    """Return a whole model in memory."""
    loaded = model.load_model(header, section.model_copy(update={"dtype": "float32"}), torch.device("cpu"))
    loaded.module.set_attn_implementation(loaded.own_attention)
    return loaded.module


# --- what they are compared on ---


def _tokens(result: Result) -> int:
    """Return how many tokens are worth it."""
    parameters = sum(p.numel() for p in model.build_skeleton(result.header, result.base.trust_remote_code).parameters())
    return round(min(_ROWS * _LONGEST, max(64, _OPERATIONS / (2 * parameters))))


def _probes(result: Result, tokens: int) -> Tensor:
    """Return tokens [B, T]: the beginnings of rows, all as long as the shortest."""
    rows = sorted((example.input_ids for example in _held_out(result)[: 2 * _ROWS]), key=len)[-_ROWS:]
    length = max(1, min(len(rows[0]), tokens // len(rows)))
    return torch.tensor([list(row[:length]) for row in rows])


def _held_out(result: Result) -> Sequence[Example]:
    """Return rows of the run that it was not trained on, where they are still there; else sentences without targets."""
    if result.config is not None and result.data is not None:
        try:
            found, _, name = run_to_end(held_out_of(result.data, result.config.seed, result.header))
            rows = [found[number] for number in range(min(len(found), 8 * _ROWS))]
            return rows if name != "training" else [Example(row.input_ids, _untrained(row), row.where) for row in rows]
        except UserError:
            pass  # the data moved away: the comparison is as strict on any other text
    rows = result.header.tokenizer(list(_SENTENCES))["input_ids"]
    return [Example(tuple(row), (IGNORED,) * len(row), "a sentence of ours") for row in rows]


def _untrained(row: Example) -> tuple[int, ...]:
    return (IGNORED,) * len(row)


def _padded(rows: Sequence[Example], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shortest rows as ids [B, T], filled up on the right, which no token before can see.

    And of each position [B * T] the label of what follows, and whether it is a real one.
    """
    rows = sorted(rows, key=len)
    rows = [row for number, row in enumerate(rows, 1) if number == 1 or number * len(row) <= tokens]
    length = min(tokens, len(rows[-1]))

    def filled(values: Sequence[Sequence[int]], by: int) -> Tensor:
        return torch.tensor([[*each[:length], *[by] * (length - len(each))] for each in values])

    ids = filled([row.input_ids for row in rows], 0)
    labels = filled([row.labels[1:] for row in rows], IGNORED).flatten()
    real = filled([[1] * len(row) for row in rows], 0).bool().flatten()
    return ids, labels, real
