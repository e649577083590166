"""The frozen base and the adapter on it: keys that configs share because their programs hand them to PEFT and FSDP.

Their meaning and defaults: peft.LoraConfig (read in 0.21.2) and transformers.TrainingArguments (5.24.0).
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Rule, Source, Taken, Unsaid, is_off


@dataclass(frozen=True)
class AdapterKeys:
    """What a program calls the keys of an adapter, and its defaults."""

    rank: str
    dora: str
    rslora: str
    default_rank: int
    default_alpha: Callable[[float], float]  # of the rank


def method(source: Source, keys: AdapterKeys) -> str:
    """Return the kind of adapter that is trained."""
    flags = ((keys.dora, "dora"), (keys.rslora, "rslora"))
    return next((ours for key, ours in flags if not is_off(source.get(key))), "lora")


def adapter(keys: AdapterKeys, is_full: Callable[[Source], bool]) -> Rule:
    """Return the rule for rank, scale and kind of the adapter.

    PEFT scales DoRA by alpha/sqrt(rank) too where both flags are set; here that is another alpha.
    """
    names = (keys.rank, "lora_alpha", "lora_dropout", keys.dora, keys.rslora, "loraplus_lr_ratio")

    def convert(source: Source) -> Iterator[Outcome]:
        if is_full(source):
            yield from (
                NotNeeded(*one, "all weights are trained, so there is no adapter") for one in source.given(*names)
            )
            return
        dora, rslora = (not is_off(source.get(key)) for key in (keys.dora, keys.rslora))
        rank = source.number(keys.rank)
        r = rank or keys.default_rank
        yield Taken(keys.rank, rank, "lora.rank", rank) if rank else Unsaid("lora.rank", r, "their default")
        alpha = source.number("lora_alpha")
        factor = math.sqrt(abs(r)) if dora and rslora else 1
        scale = (alpha or keys.default_alpha(r)) * factor
        folded = f"times sqrt(rank): {keys.rslora} with DoRA" if factor != 1 else None
        yield (
            Taken("lora_alpha", alpha, "lora.alpha", scale, folded)
            if alpha
            else Unsaid("lora.alpha", scale, "their default")
        )
        if (dropout := source.number("lora_dropout")) is not None:
            yield Taken("lora_dropout", dropout, "lora.dropout", float(dropout))
        if dora:
            yield Taken(keys.dora, True, "lora.method", "dora")
        if rslora:
            yield (
                Taken(keys.rslora, True, "lora.alpha", scale, folded)
                if dora
                else Taken(keys.rslora, True, "lora.method", "rslora")
            )
        if (ratio := source.number("loraplus_lr_ratio")) is not None:
            yield Taken("loraplus_lr_ratio", ratio, "train.loraplus_ratio", float(ratio))

    ours = ("lora.rank", "lora.alpha", "lora.dropout", "lora.method", "train.loraplus_ratio")
    return Rule(names, ours, convert)


_NUMBERS = {"bf16": "bfloat16", "fp16": "float16", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
_NUMBERS |= {"pure_bf16": "bfloat16"}


def precision(names: tuple[str, ...], is_full: Callable[[Source], bool], float32_when_off: bool) -> Rule:
    """Return the rule for the number format of the frozen base, as some of these keys say it."""

    def convert(source: Source) -> Iterator[Outcome]:
        given = dict(source.given(*names))
        chosen = next(iter(given), None)
        for key, value in given.items():
            if is_full(source):
                yield NotNeeded(key, value, "weights that are trained are float32 here")
            elif key == chosen:
                yield Taken(
                    key, value, "model.dtype", "auto" if value == "auto" else _NUMBERS[key], "the adapter is float32"
                )
            else:
                yield NotNeeded(key, value, f"{chosen} decides")
        if float32_when_off and chosen is None and source.values.get("bf16") is False and not is_full(source):
            yield Unsaid("model.dtype", "float32", "bf16 and fp16 are off there")

    return Rule(names, ("model.dtype",), convert)


def sharding(*fsdp: str) -> Rule:
    """Return the rule for what divides a model over processes: DeepSpeed, or the keys of FSDP."""

    def convert(source: Source) -> Iterator[Outcome]:
        for key, value in source.given("deepspeed", *fsdp):
            if key == "deepspeed" and not _is_stage_three(value):
                yield NotNeeded(key, value, "ZeRO 1 and 2 divide what is trained, and an adapter's share is small")
            elif key != "deepspeed" and key != next(one for one, _ in source.given(*fsdp)):
                yield NotNeeded(key, value, "FSDP needs no settings here")
            else:
                yield Taken(key, value, "train.shard", True, "divides the frozen base; start it with --nproc")

    return Rule(("deepspeed", *fsdp), ("train.shard",), convert)


def _is_stage_three(deepspeed: Any) -> bool:
    if isinstance(deepspeed, dict):
        stage = deepspeed.get("zero_optimization")
        return isinstance(stage, dict) and stage.get("stage") == 3
    return any(name in str(deepspeed).lower() for name in ("zero3", "z3", "stage3"))


def remote_code(revision_key: str) -> Rule:
    """Return the rule for code that comes with a model: run only where its revision is pinned."""

    def convert(source: Source) -> Iterator[Outcome]:
        for one in source.given("trust_remote_code"):
            if re.fullmatch("[0-9a-f]{40}", str(source.get(revision_key))):
                yield Taken(*one, "model.trust_remote_code", True)
            else:
                why = "few models need it; for one that does, read its code, pin model.revision, and set the key"
                yield NotPossible(*one, why, False)

    return Rule(("trust_remote_code",), ("model.trust_remote_code",), convert)
