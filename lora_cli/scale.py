"""`lora scale`: the adapter at another strength, written into its alpha, where every reader of PEFT adapters looks."""

import math
from pathlib import Path

from lora_cli import adapter, adapter_folder, launch, room, storage, tuned
from lora_cli.distributed import current_world
from lora_cli.errors import InputError
from lora_cli.held_out import general_text, held_out_rows
from lora_cli.memory import tokens_worth_it
from lora_cli.reports import ScaleReport, ScanPoint
from lora_cli.scan import scan
from lora_cli.tuned import Result


def scale(
    path: Path,
    output: Path,
    gain: float | None,
    budget: float | None,
    data: str | None = None,
    general: str | None = None,
    base: str | None = None,
) -> ScaleReport:
    """Write an adapter whose update is `gain` times RUN's; or the one that learns most within a forgetting budget.

    The budget is the largest allowed rise of loss on general text, in nats. Raises InputError where none is within it.
    """
    if (gain is None) == (budget is None):
        raise InputError("--gain, --budget: give one of them.")
    launch.require_alone("an adapter is scaled at once")
    room.require_new(output)
    result = tuned.find(path, base)
    adapter.require_low_rank(
        result.adapter, "`lora eval --scan` measures it at other strengths; train with another lora.alpha or rate."
    )
    point = None
    if budget is not None:
        point = _best_within(result, budget, data, general)
        gain = point.gain
    assert gain is not None, "given or found"
    if not 0 < gain < math.inf:
        raise InputError(f"--gain: must be a finite number above 0, not {gain}; at 0 an adapter is the base model.")
    with storage.new_directory(output) as folder:
        adapter_folder.copy(result.adapter.folder, folder)
        alpha = adapter_folder.scale_alphas(folder, gain)
    return ScaleReport(output, gain, alpha, point)


def _best_within(result: Result, budget: float, data: str | None, general: str | None) -> ScanPoint:
    held_out, _, _ = held_out_rows(result, data)
    text = general_text(result, general)
    if not text:
        raise InputError("--budget: the run measures no forgetting (eval.general: false); give --general FILE.")
    loaded = tuned.load(result, current_world(result.base.device).device)
    found = scan(loaded, held_out, text, tokens_worth_it(loaded.device), budget)
    if not found.best_within:
        least = next(point for point in found.points if point.gain > 0)
        raise InputError(
            f"--budget: only the base itself stays within {budget:g}; the smallest gain tried, {least.gain:g}, raises "
            f"the loss on general text by {least.forgetting.rise.value:.4f}."
        )
    return next(point for point in found.points if point.gain == found.best_within)
