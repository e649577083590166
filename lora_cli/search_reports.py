"""What `lora tune` reports, as plain frozen records: a search, a look at one knob at a time, LoRA beside full."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.records import Estimate, Finished, TrialEnded


@dataclass(frozen=True)
class TuneReport:
    """What a search came to. The best is trained whole once no trial is under way elsewhere."""

    trials: Sequence[TrialEnded]  # all of them, by number
    best: int | None  # its number; null: none finished
    front: Sequence[int]  # numbers of those that no other beats in both objectives
    running: int  # trials under way in other processes
    config: Path | None  # of the best; null: it is not trained yet
    final: Finished | None  # how training the best whole ended
    saved: Path  # where this report lies

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
    """A key of the config, its value, and the change of validation loss at half and at twice of it."""

    key: str  # of the config
    value: float  # there
    values: Sequence[float]  # half and twice of it, where the key takes them
    changes: Sequence[float | None]  # of validation loss at those; null: training stopped
    matters: bool | None  # whether more than another seed may; null: not known

    def sides(self) -> list[tuple[float, float | None] | None]:
        """Return (value, change) at half and at twice of it, None where the key does not take that."""
        both = list(zip(self.values, self.changes, strict=True))
        lower = next((side for side in both if side[0] < self.value), None)
        upper = next((side for side in both if side[0] > self.value), None)
        return [lower, upper]

    def verdict(self) -> str:
        """Return whether it does more than another seed, in a word."""
        return {True: "yes", False: "no", None: "-"}[self.matters]


def change_in_words(change: float | None) -> str:
    """Return what a knob changes."""
    return "training stopped" if change is None else f"{change:+.4f}"


@dataclass(frozen=True)
class SensitivityReport:
    """What each knob does around a config."""

    loss: float  # validation loss, mean over the seeds
    noise: float | None  # half-width of a 95 % prediction interval of one more seed; null: one seed
    seeds: int  # runs that differ in the seed alone
    knobs: Sequence[Knob]  # the most important first
    left: Sequence[str]  # keys at 0, which have no half and no double
    plot: Path  # an SVG file
    saved: Path  # where this report lies

    def around(self) -> str:
        """Return in a sentence what the knobs are turned around."""
        noise = "not known, for one seed" if self.noise is None else f"±{self.noise:.4f}"
        return f"Validation loss {self.loss:.4f}, mean of {self.seeds} seeds; another seed may change {noise}."


@dataclass(frozen=True)
class Side:
    """One of two ways to train."""

    method: str  # lora.method
    learning_rate: float  # that was found for it
    steps: int  # taken
    parameters: int  # numbers trained
    peak_memory: int  # bytes that its process took at most
    seconds: float  # a step, the median
    loss: Estimate  # on the held-out rows
    change: Estimate  # of it, from the base's


@dataclass(frozen=True)
class AgainstFullReport:
    """What LoRA reaches of full fine-tuning, on the same held-out tokens."""

    data: str  # which rows are held out
    targets: int  # trained tokens in them
    lora: Side  # the config's own run
    full: Side  # full fine-tuning beside it
    share: Estimate | None  # of full's gain over the base that LoRA reaches; null: full gains nothing
    difference: Estimate  # LoRA's loss less full's
    saved: Path  # where this report lies
