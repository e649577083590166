"""One batch through the model: the loss at its target positions, and nothing computed anywhere else."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_cli.batches import Batch
from lora_cli.loss import LossSum, head_loss, logits_loss
from lora_cli.model import LanguageModel


def _inputs(model: LanguageModel, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if model.layout.packed:
        inputs |= {"position_ids": batch.position_ids, "sequence_lengths": list(batch.sequence_lengths)}
    elif len(batch.sequence_lengths) != 1:
        raise ValueError("this model takes one sequence a forward")
    return inputs


def packed_tokens(setting: int | Literal["auto"], device: torch.device) -> int:
    """Return how many tokens are packed into one forward where the model takes packed sequences."""
    if setting == "auto":
        return 8192 if device.type == "cuda" else 1024
    return setting


def token_budget(model: LanguageModel, setting: int | Literal["auto"]) -> int:
    """Return the tokens of one forward; 0, which gives every sequence its own, where the model packs none."""
    return packed_tokens(setting, model.device) if model.layout.packed else 0


def target_loss(model: LanguageModel, batch: Batch) -> LossSum:
    """Return the summed loss over the batch's targets."""
    if model.layout.plain_head:
        hidden = model.decoder(**_inputs(model, batch)).last_hidden_state[0, batch.positions]  # [N, D]
        return head_loss(hidden, model.head.weight, model.head.bias, batch.labels)
    return logits_loss(target_logits(model, batch), batch.labels)


def target_logits(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the logits [N, V] at the batch's target positions, by the model's own head."""
    inputs = _inputs(model, batch)
    logits: Tensor = model.module(**inputs, logits_to_keep=batch.positions).logits[0]
    return logits


@contextlib.contextmanager
def embedding_noise(model: LanguageModel, alpha: float | None, batch: Batch) -> Iterator[None]:
    """Add noise to the embeddings while the block runs (NEFTune, Jain et al. 2023, arXiv 2310.05914); none for None.

    It is uniform in [-1, 1], times alpha / sqrt(L d), for each sequence of L tokens with d numbers each.
    """
    if alpha is None:
        yield
        return

    def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # [1, T, d]
        sizes = [alpha / (length * output.shape[-1]) ** 0.5 for length in batch.sequence_lengths]
        scale = torch.repeat_interleave(
            torch.tensor(sizes, device=output.device), torch.tensor(batch.sequence_lengths, device=output.device)
        )
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * scale[:, None]).to(output.dtype)

    handle = model.module.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
