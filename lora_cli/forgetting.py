"""How far a model has gone from its base, measured at every validation, and targets it should not be trained on."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_cli.dataset import Dataset
from lora_cli.distributed import ALONE, World
from lora_cli.evaluate import BASE_AND_ADAPTER, Measured, measure, scores
from lora_cli.examples import IGNORED, Example
from lora_cli.general import spread
from lora_cli.intervals import difference, estimate, independent_difference
from lora_cli.model import LanguageModel
from lora_cli.records import Forgetting, Tested

_KL_TOKENS = 2048  # of the validation set, whose targets the base is asked about too


class Validation:
    """A validation set, and general text to measure forgetting on (None: it is not measured)."""

    def __init__(
        self, model: LanguageModel, examples: Dataset, general: Sequence[Example] | None, world: World = ALONE
    ) -> None:
        self.model = model
        self.examples = examples
        self.general = general
        self.world = world
        self._base: Measured | None = None  # on the general text; it does not change
        self._at_start: tuple[Measured, Forgetting | None] | None = None

    def without_general(self) -> "Validation":
        """Return the validation set alone, for what needs no measure of forgetting."""
        return Validation(self.model, self.examples, None, self.world) if self.general else self

    def of_rows(self, count: int) -> "Validation":
        """Return a validation set of at most so many of the rows, evenly spread."""
        if count >= len(self.examples):
            return self
        return Validation(self.model, self.examples.where(self._spread(count)), self.general, self.world)

    def _spread(self, wanted: float) -> np.ndarray:
        """Return which rows are taken where so many are wanted, evenly spread."""
        taken = np.zeros(len(self.examples), bool)
        taken[spread(len(taken), wanted)] = True
        return taken

    def measure_base(self, tokens: int) -> tuple[Measured, Forgetting | None]:
        """Measure a model whose adapter is fresh; later runs on the same base are told what was found."""
        if self._at_start is None:
            self._at_start = self.measure(tokens)
        return self._at_start

    def measure(self, tokens: int) -> tuple[Measured, Forgetting | None]:
        """Measure the tuned model; `tokens` is one forward's budget."""
        world = self.world
        if not self.general:
            return measure(self.model, self.examples, tokens, world=world)[0], None
        near = self._spread(_KL_TOKENS / self.examples.lengths.mean())
        _, beside_base = measure(self.model, self.examples.where(near), tokens, BASE_AND_ADAPTER, world)
        (rest,) = measure(self.model, self.examples.where(~near), tokens, world=world)
        if self._base is None:
            (self._base,) = measure(self.model, self.general, tokens, (0.0,), world)
        (general,) = measure(self.model, self.general, tokens, world=world)
        return beside_base + rest, forgetting(self._base, general, beside_base)


def forgetting(base_general: Measured, general: Measured, on_task: Measured) -> Forgetting:
    """Return the rise of loss on general text, and the KL to the base on the task's own targets."""
    return Forgetting(
        rise=difference(base_general.per_target("loss"), general.per_target("loss")),
        base_loss=base_general.mean("loss"),
        tokens=int(general.targets.sum()),
        kl=estimate(on_task.per_target("kl")),
        kl_tokens=int(on_task.targets.sum()),
    )


def measure_chosen(validation: Validation, rows: Sequence[Example], tokens: int) -> Tested:
    """Measure a chosen adapter on rows that chose nothing, beside the validation rows that chose it."""
    changes = []
    for examples in (validation.examples, rows):
        base, tuned = measure(validation.model, examples, tokens, BASE_AND_ADAPTER, validation.world)
        changes.append(difference(base.per_target("loss"), tuned.per_target("loss")))
    return Tested(
        targets=int(tuned.targets.sum()),
        base_loss=base.mean("loss"),
        loss=tuned.mean("loss"),
        change=changes[1],
        flattery=independent_difference(*changes),
    )


def without_surprising(model: LanguageModel, examples: Sequence[Example], limit: float, tokens: int) -> list[Example]:
    """Leave out the targets whose loss under the base is above a limit, in nats; an example keeps its least surprising.

    Such targets make a model forget most (Selective Token Masking, arXiv 2501.14315). Costs a forward of the base.
    """
    losses: list[list[float]] = [[] for _ in examples]
    for owners, found in scores(model, examples, tokens, (0.0,)):
        for owner, loss in zip(owners, found[0, 0].tolist(), strict=True):
            losses[owner].append(loss)
    return [_masked(example, of_example, limit) for example, of_example in zip(examples, losses, strict=True)]


def _masked(example: Example, losses: Sequence[float], limit: float) -> Example:
    limit = max(limit, min(losses))
    of_target = iter(losses)
    rest = (IGNORED if label == IGNORED or next(of_target) > limit else label for label in example.labels[1:])
    return replace(example, labels=(example.labels[0], *rest))
