"""The token-weighted loss on a set of examples, tail included."""

from collections.abc import Iterator, Sequence

import torch

from lora_cli import lora
from lora_cli.batches import Batch, micro_batches
from lora_cli.dataset import Dataset
from lora_cli.examples import Example
from lora_cli.forward import form, lay_out, target_loss
from lora_cli.loss import ZERO, LossSum
from lora_cli.model import LanguageModel

_BLOCK = 256  # examples that are divided into micro-batches together


def batches(model: LanguageModel, examples: Sequence[Example], tokens: int) -> Iterator[Batch]:
    """Iterate over a set's batches; neighbours in length share one."""
    lengths = examples.lengths.tolist() if isinstance(examples, Dataset) else [len(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: lengths[index])
    for begin in range(0, len(order), _BLOCK):
        block = [examples[index] for index in order[begin : begin + _BLOCK]]
        for micro_batch in micro_batches(block, tokens, form(model), share=True):
            yield lay_out(model, micro_batch, block)


@torch.inference_mode()
def evaluate(model: LanguageModel, examples: Sequence[Example], tokens: int) -> LossSum:
    """Return the loss sum and correct count over a set's targets, dropout off; `tokens` is one forward's budget."""
    lora.set_dropout(model.module, active=False)
    result = ZERO
    for batch in batches(model, examples, tokens):
        result = result + target_loss(model, batch)
    return result
