"""The gradients of one optimizer step, over all ranks: sharing the work out changes no number beyond rounding.

Which forwards a step is divided into is the same however many ranks take them in turn. Dropout is the same however it
is divided.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_cli import lora
from lora_cli.batches import MicroBatch
from lora_cli.config import RunConfig
from lora_cli.distributed import World, memory_error
from lora_cli.errors import SurroundingsError
from lora_cli.examples import Example
from lora_cli.forward import embedding_noise, form, lay_out, pull_to_base, target_loss
from lora_cli.lanes import Lane, Lanes, divide
from lora_cli.loss import ZERO, LossSum
from lora_cli.randomness import derive_seed

WINDOW = 32  # steps whose losses a jump is seen against
_LOST = 1.0  # nats
_LEAST = 8  # before there are so many, nothing is a jump

Suspect = tuple[float, list[str]]  # the highest mean loss of a forward (infinite: it is not finite), and its rows


@dataclass(frozen=True)
class Summed:
    """The loss of a step, summed over all ranks, and this rank's suspect."""

    loss: LossSum
    suspect: Suspect


@dataclass(frozen=True)
class _Part:
    """What a lane made of its forwards. `ran_out` is the error where memory was not enough for one of them."""

    loss: LossSum
    suspect: Suspect
    ran_out: Exception | None


def add_gradients(
    lanes: Lanes,
    config: RunConfig,
    number: int,
    examples: Sequence[Example],
    tokens: int,
    world: World,
    checked: bool = False,
) -> Summed | None:
    """Add this rank's share to the gradients of all token losses of a step, divided once by the step's targets.

    Returns None, with the gradients at zero, where a rank's memory ran out and smaller forwards, or fewer at a time,
    would need less. A rank's suspect is its first loss that is not finite; `checked` looks at the gradients likewise.
    """
    targets = sum(example.targets for example in examples)
    share = config.train.share_prefixes and config.train.neftune_alpha is None  # noise is drawn for each sequence
    loads = divide(examples, tokens, form(lanes.of_each[0].model), share, len(lanes))
    parts = lanes.run(lambda lane, load: _run(lane, load, config, number, examples, targets, world, checked), loads)
    ran_out = next((part.ran_out for part in parts if part.ran_out), None)
    loss = sum((part.loss for part in parts), ZERO)
    sums = world.add_up(
        torch.tensor([float(loss.total), float(loss.penalty), float(ran_out is not None)], dtype=torch.float64)
    )
    if sums[2] == 0:
        lanes.collect()
        return Summed(LossSum(sums[0], targets, sums[1]), max(part.suspect for part in parts))
    if len(lanes) == 1 and len(loads[0]) == len(examples):
        raise ran_out or SurroundingsError("another process ran out of memory.", state="The step was not applied.")
    lanes.clear()
    return None


def _run(
    lane: Lane,
    plan: Sequence[MicroBatch],
    config: RunConfig,
    number: int,
    examples: Sequence[Example],
    targets: int,
    world: World,
    checked: bool,
) -> _Part:
    """Run a lane's forwards, this rank's share of them, and add to its gradients."""
    model, settings = lane.model, config.train
    lora.set_dropout(model.module, derive_seed(config.seed, "dropout", number))
    loss, suspect = ZERO, (-math.inf, list[str]())
    try:
        for micro_batch, counts in world.share(range(len(plan))):
            if settings.neftune_alpha is not None:
                torch.manual_seed(derive_seed(config.seed, "noise", number, micro_batch))
            batch = lay_out(model, plan[micro_batch], examples)
            pull = None
            if settings.kl_to_base:
                pull = pull_to_base(model, batch, settings.kl_to_base, settings.kl_without_target)
            with embedding_noise(model, settings.neftune_alpha, batch):
                part = target_loss(model, batch, pull)
            (part.total * (counts / targets)).backward()
            if not counts:
                continue
            loss = loss + replace(part, total=part.total.detach())
            mean = float(part.total.detach()) / part.targets
            is_finite = math.isfinite(mean) and not (checked and not math.isfinite(float(lane.gradients.norm())))
            if suspect[0] < math.inf:
                rows = [examples[member].where for group in plan[micro_batch] for member in group.members]
                suspect = max(suspect, (mean if is_finite else math.inf, rows))
    except (RuntimeError, MemoryError) as error:
        if memory_error(error) is None or world.in_step:  # the others wait for the forward that failed
            raise
        return _Part(loss, suspect, error)
    return _Part(loss, suspect, None)


def worst_rows(suspect: Suspect, world: World) -> str:
    """Return the first rows of the suspect of all ranks that is most likely to be at fault, as text."""
    _, rows = max(world.gather(suspect))
    return ", ".join(rows[:8]) + (", ..." if len(rows) > 8 else "")


def jump(loss: float, before: Sequence[float], factor: float | None) -> float | None:
    """Return the median of the losses before, where a loss is more than `factor` times that; else None."""
    if factor is None or len(before) < _LEAST:
        return None
    median = statistics.median(before)
    return median if loss > factor * median else None


def lost(losses: Sequence[float], base_loss: float | None) -> float | None:
    """Return the mean loss of the last WINDOW steps, where it is above the base's by more than a nat; else None."""
    if len(losses) < WINDOW or base_loss is None:
        return None
    mean = statistics.fmean(losses)
    return mean if mean > base_loss + _LOST else None
