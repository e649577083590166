"""What a model does on a set of examples, tail included: loss, accuracy, and its distance from the base."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lora_cli import interrupt, lora
from lora_cli.batches import Batch, micro_batches
from lora_cli.dataset import Dataset
from lora_cli.distributed import ALONE, World
from lora_cli.errors import Interrupted
from lora_cli.examples import Example
from lora_cli.forward import form, lay_out, target_scores
from lora_cli.lanes import lanes_to_ask
from lora_cli.model import LanguageModel

BASE_AND_ADAPTER = (0.0, 1.0)  # the gains
_BLOCK = 256  # examples that are divided into micro-batches together


@dataclass(frozen=True)
class Measured:
    """Sums over the targets of each unit: the examples that share a prompt; float64 [units] each.

    `loss` is negative log-likelihood (nats), `correct` counts targets that were the most likely token, `kl` is
    KL(reference || this model) where a reference was measured beside it, else zero.
    """

    targets: np.ndarray
    loss: np.ndarray
    correct: np.ndarray
    kl: np.ndarray

    def per_target(self, name: str) -> np.ndarray:
        """Return one of the sums beside the targets, [units, 2], as `intervals` takes it."""
        return np.stack([getattr(self, name), self.targets], axis=1)

    def mean(self, name: str) -> float:
        """Return one of the sums divided by the targets."""
        return float(getattr(self, name).sum() / self.targets.sum())

    def __add__(self, other: "Measured") -> "Measured":
        """Return the units of both."""
        return Measured(*(np.concatenate(pair) for pair in zip(self._sums(), other._sums(), strict=True)))

    def _sums(self) -> tuple[np.ndarray, ...]:
        return self.targets, self.loss, self.correct, self.kl


def scores(
    model: LanguageModel,
    examples: Sequence[Example],
    tokens: int,
    gains: Sequence[float],
    world: World = ALONE,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Iterate over (number of the example of each target, what is said of it at each gain [gains, 3, targets]).

    This rank's share, batch by batch, dropout off; several forwards run at a time where that is faster.
    """
    lanes = lanes_to_ask(model, world.size)
    for lane in lanes.of_each:
        lora.set_dropout(lane.model.module, None)
    rest = _batches(model, examples, tokens, world)
    while some := list(islice(rest, len(lanes))):
        found = lanes.run(lambda lane, batch: target_scores(lane.model, batch, gains), [batch for _, batch in some])
        yield from zip((owners for owners, _ in some), found, strict=True)


def _batches(
    model: LanguageModel, examples: Sequence[Example], tokens: int, world: World
) -> Iterator[tuple[Sequence[int], Batch]]:
    """Iterate over (number of the example of each target, batch), this rank's share of them.

    Neighbours in length share one; an example is in one batch, whatever the number of ranks. No numbers come with a
    batch that is run only because other ranks run one.
    """
    lengths = examples.lengths.tolist() if isinstance(examples, Dataset) else [len(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: lengths[index])
    for begin in range(0, len(order), _BLOCK):
        numbers = order[begin : begin + _BLOCK]
        block = [examples[index] for index in numbers]
        for micro_batch, counts in world.share(micro_batches(block, tokens, form(model), share=True)):
            batch = lay_out(model, micro_batch, block)
            yield [numbers[owner] for owner in batch.owners] if counts else [], batch


def measure(
    model: LanguageModel,
    examples: Sequence[Example],
    tokens: int,
    gains: Sequence[float] = (1.0,),
    world: World = ALONE,
) -> list[Measured]:
    """Measure a set with the adapter at each gain, on the same tokens in one pass; dropout off.

    The first gain is the reference of `kl`. `tokens` is one forward's budget. Ranks share the work, and all get the
    same bits as one would alone. Raises Interrupted, on all ranks.
    """
    sums = torch.zeros(len(gains), 3, len(examples), dtype=torch.float64)
    targets = torch.zeros(len(examples), dtype=torch.float64)
    for owners, found in scores(model, examples, tokens, gains, world):
        if world.any(interrupt.requested().wanted):
            break
        if owners:
            index = torch.tensor(owners)
            targets.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
            sums.index_add_(2, index, found.double().cpu())
    if number := world.largest(interrupt.requested().signal_number or 0):
        raise Interrupted(number, "stopped on request.")
    world.add_up(targets)
    world.add_up(sums)  # of each example one rank adds something to zeros, which is exact
    units = _units(examples)
    count = int(units.max()) + 1 if len(units) else 0

    def by_unit(values: torch.Tensor) -> np.ndarray:
        return np.bincount(units, values.numpy(), minlength=count)

    return [Measured(by_unit(targets), *map(by_unit, of_gain)) for of_gain in sums]


def _units(examples: Sequence[Example]) -> np.ndarray:
    """Return the number of the unit that each example belongs to."""
    if not isinstance(examples, Dataset):
        return np.arange(len(examples))
    _, numbers = np.unique(examples.column("prompt_keys"), return_inverse=True)
    units: np.ndarray = numbers
    return units
