"""Whether training works on a device: a small random model learns a few sequences, and its adapter is merged."""

import math
import time

import torch
from torch import Tensor

from lora_cli import lora, model
from lora_cli.batches import Group
from lora_cli.config import LoraConfig, TrainConfig
from lora_cli.doctor_report import SelfTest
from lora_cli.examples import Example
from lora_cli.forward import lay_out, share_inputs, target_loss
from lora_cli.fused import fuse
from lora_cli.model import LanguageModel
from lora_cli.optim import build_optimizer, set_rate

_STEPS, _RATE = 12, 0.01
_LENGTHS = (7, 12, 20, 9)
_LEARNED = 0.9  # of the first loss, or less, is what the last must be
# Of the largest logit, between base + adapter and merged model: rounding, once in a merge and in every layer of both.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def self_test(device: torch.device) -> SelfTest:
    """Train, merge and compare; by the same code as `lora train` and `lora merge`.

    Raises FloatingPointError where a loss or a logit is not finite.
    """
    began = time.perf_counter()
    loaded = model.build_random(device)
    before = _logits(loaded)
    lora.apply_lora(loaded.module, LoraConfig(rank=8, alpha=16), seed=0)
    share_inputs(loaded)
    fuse(loaded.module)
    losses = _train(loaded)
    tuned = _logits(loaded)
    lora.merge_in_place(loaded.module)
    merged = _logits(loaded)
    difference, most = float((tuned - merged).abs().max()), float(tuned.abs().max())
    if not all(map(math.isfinite, (*losses, difference))):
        raise FloatingPointError("a loss or a logit is not finite")
    learned = losses[-1] < _LEARNED * losses[0]
    return SelfTest(
        device=str(device),
        steps=_STEPS,
        first_loss=losses[0],
        last_loss=losses[-1],
        effect=float((tuned - before).abs().max()),
        difference=difference,
        seconds=time.perf_counter() - began,
        passed=learned and difference <= _ROUNDING[loaded.module.dtype] * most,
    )


def _train(loaded: LanguageModel) -> list[float]:
    """Take some steps on one batch; return the loss of each, and of what the last one left."""
    tokens = [tuple((7 * number + 3 * place) % 250 for place in range(n)) for number, n in enumerate(_LENGTHS)]
    examples = [Example(ids, ids, "a sequence of the self-test") for ids in tokens]
    batch = lay_out(loaded, tuple(Group((number,)) for number in range(len(examples))), examples)
    optimizer = build_optimizer(lora.trainable(loaded.module), TrainConfig())
    set_rate(optimizer, _RATE)
    losses = []
    for _ in range(_STEPS):
        loss = target_loss(loaded, batch)
        losses.append(loss.mean)
        (loss.total / loss.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [*losses, target_loss(loaded, batch).mean]


@torch.no_grad()
def _logits(loaded: LanguageModel) -> Tensor:
    """Return the logits of a sequence, run as the model came."""
    ids = torch.arange(3, 35, device=loaded.device)[None]
    with model.generating(loaded):
        logits: Tensor = loaded.module(input_ids=ids, use_cache=False).logits
    return logits[0].float()
