"""One batch through the model: the loss at its target positions, and nothing computed anywhere else."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli import lora, tuning
from lora_cli.batches import ALONE, Batch, Form, MicroBatch, collate
from lora_cli.examples import Example
from lora_cli.layout import only_rows
from lora_cli.likelihood import compare_logits, compare_states
from lora_cli.loss import Head, LossSum, Pull, chunks, goes_in_pieces, head_logits, head_loss, logits_loss
from lora_cli.model import LanguageModel


def form(model: LanguageModel) -> Form:
    """Return how the sequences of one forward lie."""
    return "packed" if model.layout.packed else "padded" if model.layout.padded else "single"


def lay_out(model: LanguageModel, group: MicroBatch, examples: Sequence[Example]) -> Batch:
    """Return the batch of a micro-batch, on the model's device."""
    return collate(group, examples, model.device, padded=form(model) != "packed")


def _inputs(model: LanguageModel, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if model.layout.packed:
        inputs |= {"position_ids": batch.position_ids, "segments": batch.segments}
    return inputs


def target_states(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the last hidden states [N, D] at the targets; logits [N, V] where the head is the model's own."""
    lora.set_keys(model.module, batch.keys, batch.keys[batch.positions])
    if model.layout.head is None:
        return target_logits(model, batch)
    rows, tail = batch.positions, model.layout.tail
    with only_rows(model.module.get_submodule(tail), rows) if tail else nullcontext():
        hidden = model.decoder(**_inputs(model, batch)).last_hidden_state.flatten(0, 1)[rows]  # [M, D]
    return hidden if batch.places is None else hidden[batch.places]  # [N, D]


def target_loss(model: LanguageModel, batch: Batch, pull: Pull | None = None) -> LossSum:
    """Return the summed loss over the batch's targets."""
    states = target_states(model, batch)
    if model.layout.head is None:
        return logits_loss(states, batch.labels, pull)
    return head_loss(states, model.head.weight, model.head.bias, batch.labels, model.layout.head, pull)


@torch.no_grad()
def base_states(model: LanguageModel, batch: Batch) -> Tensor:
    """Return `target_states` of the base."""
    with tuning.gain(model.module, 0.0):
        return target_states(model, batch)


def pull_to_base(model: LanguageModel, batch: Batch, weight: float, without_target: bool) -> Pull:
    """Return the pull of a batch's targets towards what the base says of them."""
    head = None if model.layout.head is None else head_at(model, 0.0)
    return Pull(base_states(model, batch), weight, without_target, head)


def head_at(model: LanguageModel, gain: float) -> Head:
    """Return the output head at a gain."""
    weight, bias = model.head.weight, model.head.bias
    return (
        tuning.weight_at(model.module, weight, gain),
        None if bias is None else tuning.weight_at(model.module, bias, gain),
    )


@torch.inference_mode()
def target_scores(model: LanguageModel, batch: Batch, gains: Sequence[float]) -> Tensor:
    """Return what the model says of each target at each gain: [gains, 3, N], as `compare_logits`."""
    states = []
    for gain in gains:
        with tuning.gain(model.module, gain):
            states.append(target_states(model, batch))
    head = model.layout.head
    if head is None:
        return compare_logits(states, batch.labels)
    weight = model.head.weight
    if goes_in_pieces(weight.device, weight.dtype, has_pull=False, is_trained=False):
        if len(gains) <= 2 or head_at(model, 0.0)[0] is weight:
            return compare_states(states, [head_at(model, gain) for gain in gains], batch.labels, head)
        first, base = states[0], head_at(model, gains[0])  # of many that are made for it, one exists at a time
        pairs = (([first, state], [base, head_at(model, gain)]) for state, gain in zip(states, gains, strict=True))
        return torch.stack([compare_states(*pair, batch.labels, head)[1] for pair in pairs])
    found = []
    for part in chunks(batch.targets):
        logits = (
            head_logits(state[part], *head_at(model, gain), head) for gain, state in zip(gains, states, strict=True)
        )
        found.append(compare_logits(logits, batch.labels[part]))
    return torch.cat(found, -1)


def target_logits(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the logits [N, V] at the target positions of a batch of one row, by the model's own head."""
    inputs = _inputs(model, batch)
    logits: Tensor = model.module(**inputs, logits_to_keep=batch.positions).logits[0]
    return logits


@torch.no_grad()
def share_inputs(model: LanguageModel) -> None:
    """Have adapted layers that read the same input computed together; which ones do is found by a short forward."""
    if next(lora.lora_layers(model.module), None) is None:
        return
    some = Example((0, 1, 2), (0, 1, 2), "tokens of no row")
    with lora.sharing_inputs(model.module):
        target_states(model, lay_out(model, ALONE, [some]))


@contextlib.contextmanager
def embedding_noise(model: LanguageModel, alpha: float | None, batch: Batch) -> Iterator[None]:
    """Add noise to the embeddings while the block runs (NEFTune, Jain et al. 2023, arXiv 2310.05914); none for None.

    It is uniform in [-1, 1], times alpha / sqrt(L d), for each sequence of L tokens with d numbers each.
    """
    if alpha is None:
        yield
        return

    lengths = torch.tensor(batch.segments.lengths, device=model.device)

    def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # [1, T, d] packed, [B, T, d] padded
        scale = alpha / (lengths * output.shape[-1]).sqrt()
        scale = scale.repeat_interleave(lengths)[None] if len(output) == 1 else scale[:, None]
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * scale[..., None]).to(output.dtype)

    handle = model.module.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
