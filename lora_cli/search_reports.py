"""What `lora tune` reports, as plain frozen records: a search, a look at one knob at a time, LoRA beside full."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.records import Estimate, Finished, TrialEnded


@dataclass(frozen=True)
class TuneReport:
    """What a search came to. `best` is the number of a trial; `front` those that no other beats in both objectives.

    `running` trials are under way in other processes; only with none is the best trained whole (`final`) and written
    as a config (`config`).
    """

    trials: Sequence[TrialEnded]
    best: int | None
    front: Sequence[int]
    running: int
    config: Path | None
    final: Finished | None
    saved: Path

    def in_order(self) -> list[TrialEnded]:
        """Return the trials, the best first, those that did not end last."""
        return sorted(
            self.trials,
            key=lambda one: (one.state != "finished", one.excess, math.inf if one.loss is None else one.loss),
        )

    def note(self, one: TrialEnded) -> str:
        """Return what is special about a trial."""
        if one.number == self.best:
            return "the best"
        if one.number in self.front:
            return "not beaten in both"
        if one.state != "finished":
            return one.state
        return "over the budget" if one.excess > 0 else ""


@dataclass(frozen=True)
class Knob:
    """A key of the config, its value, and the change of validation loss at half and at twice of it.

    A change is null where training stopped; `matters` says whether one is more than another seed may make, null where
    that is not known. A key that takes only one of both has one of each.
    """

    key: str
    value: float
    values: Sequence[float]
    changes: Sequence[float | None]
    matters: bool | None


@dataclass(frozen=True)
class SensitivityReport:
    """What each knob does around a config: `loss` is the mean over `seeds` seeds, `noise` what one more may be from it.

    `noise` is the half-width of a 95 % prediction interval. `left` are keys at 0, which have no half and no double.
    """

    loss: float
    noise: float | None
    seeds: int
    knobs: Sequence[Knob]
    left: Sequence[str]
    plot: Path
    saved: Path


@dataclass(frozen=True)
class Side:
    """One of two ways to train: `loss` on the held-out rows, and its `change` from the base's.

    `peak_memory` is what its process took at most, in bytes; `seconds` the median of a step's.
    """

    method: str
    learning_rate: float
    steps: int
    parameters: int
    peak_memory: int
    seconds: float
    loss: Estimate
    change: Estimate


@dataclass(frozen=True)
class AgainstFullReport:
    """What LoRA reaches of full fine-tuning, on the same held-out tokens.

    `share` is of what full takes off the base's loss, null where it takes off nothing; `difference` is LoRA's loss less
    full's.
    """

    data: str
    targets: int
    lora: Side
    full: Side
    share: Estimate | None
    difference: Estimate
    saved: Path
