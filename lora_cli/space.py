"""What a search may change in a config: which keys, between which values, and the config with them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from pydantic import ValidationError

from lora_cli.config import Range, RunConfig
from lora_cli.errors import shown
from lora_cli.schema import OnResume, rules, value_of

Space = Mapping[str, Range | Sequence[Any]]
_ROOTS = ("lora", "train")  # the base, the rows and what is measured are the same for all
_SAME_BASE = {"lora.method": ("lora", "rslora", "dora")}  # full fine-tuning loads another


def searchable() -> list[str]:
    """Return the keys that a search may change: of adapter and training, what changes the outcome."""
    return [key for key, rule in rules(RunConfig) if key.split(".")[0] in _ROOTS and rule is not OnResume.NOTED]


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a config with other values of dotted keys. Raises ValidationError."""
    plain = config.model_dump(mode="json")
    for key, value in values.items():
        *above, last = key.split(".")
        reduce(lambda section, name: section[name], above, plain)[last] = value
    return RunConfig.model_validate(plain)


def default_space(config: RunConfig, rate: float) -> Space:
    """Return what is searched where nothing is said: a decade on either side of a learning rate, and the rank."""
    rates = Range(low=rate / 10, high=rate * 10, log=True)
    ranks = tuple(sorted({8, 32, 128, config.lora.rank}))
    return {"train.learning_rate": rates} | ({} if config.lora.method == "full" else {"lora.rank": ranks})


def is_whole(config: RunConfig, key: str) -> bool:
    """Return whether a key takes whole numbers only."""
    return _problem(config, key, 0.437) is not None and _problem(config, key, 1.437) is not None


def largest(config: RunConfig, space: Space | None) -> RunConfig:
    """Return the config whose adapter takes most memory."""
    ranks = (space or default_space(config, 1.0)).get("lora.rank", (config.lora.rank,))
    most = int(ranks.high) if isinstance(ranks, Range) else max(ranks)
    return changed(config, {"lora.rank": max(most, config.lora.rank)})


def knobs(config: RunConfig) -> Iterator[str]:
    """Iterate over the keys whose values are numbers, and that change something as the config stands."""
    stopping = ("train.early_stopping.patience", "train.early_stopping.min_delta")
    idle = {*stopping, "train.epochs" if config.train.max_steps else "train.max_steps"}
    for key in searchable():
        value = value_of(config, key)
        if key not in idle and isinstance(value, int | float) and not isinstance(value, bool):
            yield key


def halved_and_doubled(config: RunConfig) -> Mapping[str, Sequence[float]]:
    """Return half and twice the value of every knob that is not 0, as far as it takes them."""
    around = {}
    for key in knobs(config):
        value = value_of(config, key)
        pair = (value // 2, value * 2) if is_whole(config, key) else (value / 2, value * 2)
        if value and (usable := [one for one in pair if _problem(config, key, one) is None and one != value]):
            around[key] = usable
    return around


def problems_of(config: RunConfig) -> Iterator[str]:
    """Iterate over what is wrong with the space that a config names."""
    known = searchable()
    for key, wanted in (config.tune.space or {}).items():
        if key not in known:
            yield f"{shown(key)} cannot be searched; what can be: {', '.join(known)}"
            continue
        values = (wanted.low, wanted.high) if isinstance(wanted, Range) else wanted
        if isinstance(wanted, Range):
            if not wanted.low < wanted.high:
                yield f"{key}: low must be below high, found {wanted.low} and {wanted.high}"
                continue
            if wanted.log and wanted.low <= 0:
                yield f"{key}: a range in the logarithm must begin above 0, found {wanted.low}"
        if len({repr(value) for value in values}) < len(values):
            yield f"{key}: names a value twice"
        for value in values:
            if (what := _problem(config, key, value)) or value not in _SAME_BASE.get(key, (value,)):
                usable = what or f"one of {', '.join(_SAME_BASE[key])}, which train on one base"
                yield f"{key}: {shown(value, 40)} cannot be its value: {usable}"


def _problem(config: RunConfig, key: str, value: Any) -> str | None:
    try:
        changed(config, {key: value})
    except ValidationError as error:
        return "; ".join(str(item["msg"]).removeprefix("Value error, ") for item in error.errors()[:1])
    return None
