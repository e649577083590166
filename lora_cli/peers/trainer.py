"""The training loop: keys that configs share because their programs hand them to transformers' Trainer.

Their meaning and defaults: transformers.TrainingArguments (read in 5.24.0).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Rule, Source, Taken, Unsaid, is_off

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_PACKED = "there an example is a packed sequence of many rows, here it is a row: raise it by the rows in a sequence"


def epochs(key: str, default: int) -> Rule:
    """Return the rule for how long is trained; there a number of steps decides alone where it is given."""

    def convert(source: Source) -> Iterator[Outcome]:
        passes, limit = source.number(key), source.number("max_steps")
        if limit is not None and limit > 0:
            yield Taken("max_steps", limit, "train.max_steps", limit)
            yield Unsaid("train.epochs", limit, "so many that max_steps decides alone, as it does there")
            if passes is not None:
                yield NotNeeded(key, passes, "max_steps decides alone there")
            return
        if limit is not None:
            yield NotNeeded("max_steps", limit, "is no limit there")
        if passes is None:
            yield Unsaid("train.epochs", default, f"their default of {key}")
        elif passes >= 1 and passes == int(passes):
            yield Taken(key, passes, "train.epochs", passes)
        else:
            whole = max(1, math.ceil(passes))
            yield NotPossible(key, passes, f"whole passes only, so {whole}; train.max_steps ends earlier", True)
            yield Unsaid("train.epochs", whole, f"{key}: {passes}, rounded up")

    return Rule((key, "max_steps"), ("train.epochs", "train.max_steps"), convert)


def schedule(key: str, default: str, warmup: float) -> Rule:
    """Return the rule for the learning rate's course; `warmup` is the share of steps where their file says nothing."""

    def convert(source: Source) -> Iterator[Outcome]:
        name = str(source.get(key, default)).lower()
        ours = _SCHEDULES.get(name)
        if ours is None:
            why = f"{', '.join(dict.fromkeys(_SCHEDULES.values()))} are there; cosine is written"
            yield NotPossible(key, source.get(key), why, True)
        elif source.get(key) is None:
            yield Unsaid("train.schedule", ours, f"their default of {key}")
        else:
            yield Taken(key, source.get(key), "train.schedule", ours)
        if name == "constant":
            yield from (NotNeeded(one, value, "constant there knows no warm-up") for one, value in _warmups(source))
            yield Unsaid("train.warmup_ratio", 0.0, "constant there knows no warm-up")
        else:
            yield from _warmup(source, warmup)

    return Rule((key, "warmup_steps", "warmup_ratio"), ("train.schedule", "train.warmup_ratio"), convert)


def _warmups(source: Source) -> list[tuple[str, Any]]:
    return [(key, value) for key in ("warmup_steps", "warmup_ratio") if (value := source.number(key)) is not None]


def _warmup(source: Source, default: float) -> Iterator[Outcome]:
    """Iterate over what becomes of the warm-up: steps there where they are given, here a share of all steps."""
    steps, ratio, limit = (source.number(key) for key in ("warmup_steps", "warmup_ratio", "max_steps"))
    if steps is None and ratio is None:
        yield Unsaid("train.warmup_ratio", default, "their default")
    elif ratio is not None and not steps:
        yield Taken("warmup_ratio", ratio, "train.warmup_ratio", ratio)
        if steps is not None:
            yield NotNeeded("warmup_steps", steps, "warmup_ratio decides there")
    elif steps is not None:
        if ratio is not None:
            yield NotNeeded("warmup_ratio", ratio, "warmup_steps decides there")
        if steps < 1:
            yield Taken("warmup_steps", steps, "train.warmup_ratio", float(steps))
        elif limit is not None and limit > 0:
            yield Taken("warmup_steps", steps, "train.warmup_ratio", round(steps / limit, 6), "a share of all steps")
        else:
            why = "train.warmup_ratio is a share of all steps: divide by the steps that `lora check` shows"
            yield NotPossible("warmup_steps", steps, why, False)


def batch(micro: str, default: int, packing: tuple[str, ...], whole: str | None = None) -> Rule:
    """Return the rule for the batch: examples of a step over all processes. `whole` names a process's whole batch."""
    keys = (micro, "gradient_accumulation_steps", *([whole] if whole else []))

    def convert(source: Source) -> Iterator[Outcome]:
        own, parts = source.number(micro), source.number("gradient_accumulation_steps")
        total = source.number(whole) if whole and parts is None else None
        rows = (total or (own or default) * (parts or 1)) * source.processes
        count = "1 process" if source.processes == 1 else f"{source.processes} processes"
        cut = f"{total or f'{own or default} x {parts or 1}'} x {count}"
        packed = any(not is_off(source.get(key)) for key in packing)
        differs: str | None = f"{cut}; {_PACKED}" if packed else cut
        if own is parts is total is None:
            yield Unsaid("train.batch_size", rows, f"their default, {cut}")
        for key in keys:
            if key == whole and total is None and source.number(key) is not None:
                yield NotNeeded(key, source.get(key), "gradient_accumulation_steps decides there")
            elif (value := source.number(key)) is not None:
                yield Taken(key, value, "train.batch_size", rows, differs)
                differs = None

    return Rule(keys, ("train.batch_size",), convert)


def evaluations(patience: str, epochs_key: str, per_epoch: str | None, validates: Callable[[Source], bool]) -> Rule:
    """Return the rule for validation passes and early stopping, which counts them."""
    often = tuple(key for key in (per_epoch, "eval_steps", "eval_strategy", "evaluation_strategy") if key)

    def convert(source: Source) -> Iterator[Outcome]:
        if not validates(source):
            yield from (NotNeeded(*one, "no rows are held out there") for one in source.given(*often, patience))
            return
        yield from _how_often(source, often, "eval.per_epoch", epochs_key)
        if (count := source.number(patience)) is None:
            yield Unsaid(
                "train.early_stopping.patience", None, "they stop only when told; the best is kept all the same"
            )
        else:
            yield Taken(patience, count, "train.early_stopping.patience", count, "evaluations, there as here")

    return Rule((*often, patience), ("eval.per_epoch", "train.early_stopping.patience"), convert)


def saves(epochs_key: str, per_epoch: str | None) -> Rule:
    """Return the rule for checkpoints."""
    often = tuple(key for key in (per_epoch, "save_steps", "save_strategy") if key)

    def convert(source: Source) -> Iterator[Outcome]:
        yield from _how_often(source, often, "save.per_epoch", epochs_key)
        if (keep := source.number("save_total_limit")) is not None:
            yield Taken("save_total_limit", keep, "save.keep", keep, "the best is kept beside them")

    return Rule((*often, "save_total_limit"), ("save.per_epoch", "save.keep"), convert)


def _how_often(source: Source, keys: tuple[str, ...], ours: str, epochs_key: str) -> Iterator[Outcome]:
    """Iterate over what becomes of keys that say when; here that is a number in each epoch."""
    passes = source.number(epochs_key) or 1
    for key, value in source.given(*keys):
        number = source.number(key)
        if key.endswith("strategy"):
            if value == "epoch":
                yield Taken(key, value, ours, 1)
            else:
                yield NotNeeded(key, value, "another key says how often" if value == "steps" else "the best is kept")
        elif number is None:
            yield NotPossible(key, value, f"is no number; {ours} counts them in an epoch", False)
        elif key.endswith("per_epoch"):
            yield Taken(key, value, ours, number)
        elif 0 < number < 1:
            yield Taken(key, value, ours, max(1, round(1 / (number * passes))), "a share of all steps there")
        else:
            yield NotPossible(
                key, value, f"{ours} counts them in an epoch, and how many steps that is is not known", False
            )


def resume(*keys: str) -> Rule:
    """Return the rule for going on with a run."""

    def convert(source: Source) -> Iterator[Outcome]:
        for key, value in source.given(*keys):
            if isinstance(value, str):
                yield NotPossible(key, value, "a run goes on from checkpoints of its own, by the same command", True)
            else:
                yield NotNeeded(key, value, "the same command goes on with a run that was interrupted")

    return Rule(keys, (), convert)


def switch(key: str, ours: str) -> Rule:
    """Return the rule for a key that switches something on, whatever it says besides."""

    def convert(source: Source) -> Iterator[Outcome]:
        yield from (Taken(*one, ours, True) for one in source.given(key))

    return Rule((key,), (ours,), convert)
