"""The token-weighted loss on a set of examples, tail included."""

from collections.abc import Sequence

import torch

from lora_cli import lora
from lora_cli.batches import MicroBatch, collate, micro_batches
from lora_cli.dataset import Dataset
from lora_cli.examples import Example
from lora_cli.forward import target_loss
from lora_cli.loss import ZERO, LossSum
from lora_cli.model import LanguageModel

_BLOCK = 256  # examples that are packed together


def plan(examples: Sequence[Example], tokens: int) -> list[MicroBatch]:
    """Plan the micro-batches of a set; neighbours in length share one."""
    lengths = examples.lengths.tolist() if isinstance(examples, Dataset) else [len(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: lengths[index])
    blocks = [order[begin : begin + _BLOCK] for begin in range(0, len(order), _BLOCK)]
    return [one for block in blocks for one in micro_batches(block, lengths, tokens)]


@torch.no_grad()
def evaluate(model: LanguageModel, examples: Sequence[Example], tokens: int) -> LossSum:
    """Return the loss sum and correct count over a set's targets, dropout off; `tokens` is one forward's budget."""
    lora.set_dropout(model.module, active=False)
    result = ZERO
    for indices in plan(examples, tokens):
        result = result + target_loss(model, collate([examples[i] for i in indices], model.device))
    return result
