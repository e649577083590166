"""Which examples each step sees, and how they are laid out in memory.

The plan is data, a pure function of (lengths, seed, epoch): steps of micro-batches of indices.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.examples import IGNORED, Example
from lora_cli.randomness import derive_seed

MicroBatch = tuple[int, ...]  # indices of the examples one forward sees
Step = tuple[MicroBatch, ...]  # one optimizer update


@dataclass(frozen=True)
class Batch:
    """Sequences packed one behind the other, and where their targets are.

    A position is a target when the token that follows it is trained; `labels` are those tokens.
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in each sequence
    sequence_lengths: tuple[int, ...]  # sum T
    positions: Tensor  # [N], indices into T
    labels: Tensor  # [N]

    @property
    def targets(self) -> int:
        return len(self.labels)


def micro_batches(indices: Sequence[int], lengths: Sequence[int], tokens: int) -> list[MicroBatch]:
    """Pack examples into micro-batches of at most `tokens` tokens, the longest first, each into the first that fits.

    An example longer than the budget gets a micro-batch of its own.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        fits = next((number for number, room in enumerate(free) if room >= lengths[index]), None)
        if fits is None:
            bins.append([index])
            free.append(tokens - lengths[index])
        else:
            bins[fits].append(index)
            free[fits] -= lengths[index]
    return [tuple(one) for one in bins]


def steps_in_epoch(examples: int, batch_size: int) -> int:
    """Return the number of steps of an epoch; the last one may see fewer examples."""
    return -(-examples // batch_size)


@dataclass(frozen=True)
class Part:
    """Neighbouring examples of one source, and how many times an epoch sees each; 0.5 sees half of them."""

    begin: int
    count: int
    times: float = 1.0

    @property
    def drawn(self) -> int:
        """Examples an epoch draws: a whole number, and never none."""
        return max(1, int(self.times) * self.count + round(self.times % 1 * self.count))


@dataclass(frozen=True)
class Mixture:
    """Which examples an epoch sees, before they are put in order."""

    parts: tuple[Part, ...]

    @property
    def drawn(self) -> int:
        """Examples an epoch draws; the same for every epoch."""
        return sum(part.drawn for part in self.parts)

    def draw(self, seed: int, epoch: int) -> list[int]:
        """Return the examples of an epoch (the first is 0). What is seen in part goes on where the last epoch ended."""
        drawn: list[int] = []
        for number, part in enumerate(self.parts):
            once = range(part.begin, part.begin + part.count)
            drawn += list(once) * int(part.times)
            if some := part.drawn - int(part.times) * part.count:
                shuffled = list(once)
                random.Random(derive_seed(seed, "mixture", number)).shuffle(shuffled)
                drawn += [shuffled[(epoch * some + index) % part.count] for index in range(some)]
        return drawn


def plan_epoch(
    lengths: Sequence[int], mixture: Mixture, batch_size: int, tokens: int, seed: int, epoch: int
) -> list[Step]:
    """Plan the steps of an epoch (the first is 0): what the mixture draws, in an order of its own for each epoch."""
    order = mixture.draw(seed, epoch)
    random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
    return [
        tuple(micro_batches(order[begin : begin + batch_size], lengths, tokens))
        for begin in range(0, len(order), batch_size)
    ]


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """Lay examples out one behind the other."""
    ids: list[int] = []
    positions_in_sequence: list[int] = []
    targets: list[int] = []
    labels: list[int] = []
    for example in examples:
        offset = len(ids)
        ids.extend(example.input_ids)
        positions_in_sequence.extend(range(len(example)))
        for index, label in enumerate(example.labels[1:]):
            if label != IGNORED:
                targets.append(offset + index)
                labels.append(label)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    lengths = tuple(len(example) for example in examples)
    return Batch(tensor(ids)[None], tensor(positions_in_sequence)[None], lengths, tensor(targets), tensor(labels))
