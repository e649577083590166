"""The gain scan: what an adapter learns and forgets at each strength, without training again.

Near the base both losses are smooth in the gain, and forgetting grows with its square where the gain on the task is
still about linear: a little less of an adapter often forgets far less.
"""

from collections.abc import Sequence

from lora_cli.dataset import Dataset
from lora_cli.distributed import ALONE, World
from lora_cli.evaluate import Measured, measure
from lora_cli.examples import Example
from lora_cli.forgetting import forgetting
from lora_cli.intervals import difference, estimate
from lora_cli.model import LanguageModel
from lora_cli.reports import ScanPoint, ScanReport

GAINS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)


def scan(
    model: LanguageModel,
    held_out: Dataset,
    general: Sequence[Example],
    tokens: int,
    budget: float | None,
    world: World = ALONE,
) -> ScanReport:
    """Measure held-out rows and general text at every gain, each in one pass. `tokens` is one forward's budget."""
    on_task = measure(model, held_out, tokens, GAINS, world)
    on_general = measure(model, general, tokens, GAINS, world)
    points = [_point(gain, on_task, on_general) for gain in GAINS]
    within = [point for point in points if budget is not None and _rise(point) <= budget]
    return ScanReport(
        points=points,
        best=min(points, key=_loss).gain,
        knee=_knee(points),
        budget=budget,
        best_within=min(within, key=_loss).gain if within else None,
    )


def _point(gain: float, on_task: Sequence[Measured], on_general: Sequence[Measured]) -> ScanPoint:
    place = GAINS.index(gain)
    base, tuned = (measured.per_target("loss") for measured in (on_task[0], on_task[place]))
    return ScanPoint(
        gain=gain,
        loss=estimate(tuned),
        change=difference(base, tuned),
        token_accuracy=on_task[place].mean("correct"),
        forgetting=forgetting(on_general[0], on_general[place], on_task[place]),
    )


def _loss(point: ScanPoint) -> float:
    return point.loss.value or 0.0


def _rise(point: ScanPoint) -> float:
    return point.forgetting.rise.value or 0.0


def _knee(points: Sequence[ScanPoint]) -> float:
    """Return the gain whose share of the best gain on the task is farthest above its share of the forgetting there."""
    first, best = points[0], min(points, key=_loss)
    gained, forgot = _loss(first) - _loss(best), _rise(best) - _rise(first)
    if gained <= 0 or forgot <= 0:
        return best.gain

    def above(point: ScanPoint) -> float:
        return (_loss(first) - _loss(point)) / gained - (_rise(point) - _rise(first)) / forgot

    return max((point for point in points if point.gain <= best.gain), key=above).gain
