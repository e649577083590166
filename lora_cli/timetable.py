"""At which steps of a run what happens."""

from dataclasses import dataclass

from lora_cli.batches import steps_in_epoch
from lora_cli.config import RunConfig


@dataclass(frozen=True)
class Timetable:
    """At which steps what happens: pure arithmetic."""

    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, examples: int, config: RunConfig) -> "Timetable":
        """Return the timetable of a run that draws a number of examples an epoch."""
        per_epoch = steps_in_epoch(examples, config.train.batch_size)
        total = per_epoch * config.train.epochs
        return cls(per_epoch, min(total, config.train.max_steps or total))

    def is_due(self, step: int, per_epoch: int) -> bool:
        """Return whether something that happens `per_epoch` times an epoch, and at the end, happens after a step."""
        before, after = ((step - done) * per_epoch // self.steps_per_epoch for done in (1, 0))
        return after > before or step == self.total_steps
