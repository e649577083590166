"""What no single field of a config can see: keys that do not go together, and those this version cannot honour."""

import re
from pathlib import Path

from lora_cli import space
from lora_cli.config import ModelConfig, RunConfig
from lora_cli.data_config import FORMAT_KEYS
from lora_cli.errors import shown
from lora_cli.schema import flat

# Keys that name a place.
_PLACES = (
    *("model.path", "data.train", "data.validation", "data.test", "data.chat_template", "data.replay.path"),
    *("eval.general", "output_dir"),
)


def problem_of_remote_code(model: ModelConfig) -> str | None:
    """Return why a model's own code cannot be trusted as it is named: what is run must not change by itself."""
    pinned = re.fullmatch(r"[0-9a-f]{40}", model.revision or "")
    if not model.trust_remote_code or pinned or Path(model.path).expanduser().is_dir():
        return None
    return (
        f"{model.path} is no folder here, so the code that is run could change: set model.revision to the commit that "
        "you have read (40 hexadecimal digits)"
    )


# What lora.method: full leaves without effect: only the default is not a mistake.
_OF_ADAPTERS = (
    *("lora.rank", "lora.alpha", "lora.dropout", "lora.init", "lora.target_modules"),
    "train.loraplus_ratio",
)


def _problems_of_full(config: RunConfig) -> dict[str, str]:
    """Return what does not go together with training all weights."""
    problems = {}
    for key in _OF_ADAPTERS:
        section, name = key.split(".")
        of = getattr(config, section)
        default = type(of).model_fields[name].default
        if getattr(of, name) != default:
            problems[key] = (
                f"{shown(getattr(of, name), 40)} has no effect with lora.method: full, which trains the weights "
                f"themselves and makes no adapter; leave it out, or at its default, {default}"
            )
    if config.model.dtype != "float32":
        problems["model.dtype"] = (
            f"lora.method: full trains the weights themselves, and steps as small as its own are lost in "
            f"{config.model.dtype}; set float32 or auto"
        )
    if config.model.quantization is not None:
        problems["model.quantization"] = (
            "lora.method: full trains the weights themselves, and quantised ones take no gradient; set null, or "
            "lora.method: lora"
        )
    if config.train.shard:
        problems["train.shard"] = (
            "divides a frozen base, and with lora.method: full nothing is frozen; set false, or lora.method: lora"
        )
    return problems


def check_config(config: RunConfig) -> dict[str, str]:
    """Return what no single field can see, as {dotted key: problem}; empty when all is well."""
    problems: dict[str, str] = {}
    for key, value in flat(config):
        if key in _PLACES and (variable := re.search(r"\$\w+|\$\{[^}]*\}?", str(value))):
            problems[key] = f"{shown(variable[0])}: a config reads no variables of the environment; write the value"
        if key in _PLACES and "\0" in str(value):
            problems[key] = "no name of a file can hold the character NUL; take it out"
    if config.lora.method == "dora" and config.lora.init == "pissa":
        problems["lora.init"] = (
            "pissa keeps the base by taking its start off again, and DoRA's magnitude would make that longer or "
            "shorter too; set default, or lora.method: lora"
        )
    elif config.train.shard and (config.lora.method == "dora" or config.lora.init == "pissa"):
        key = "method: dora" if config.lora.method == "dora" else "init: pissa"
        problems["train.shard"] = (
            f"lora.{key} starts from whole weights, of which each process has a part only; set false, or another "
            f"lora.{key.split(':')[0]}"
        )
    if problem := problem_of_remote_code(config.model):
        problems["model.trust_remote_code"] = problem
    if config.model.device == "mps":
        problems["model.device"] = (
            "losses are summed in float64, which MPS does not have, and nothing was tried there; set auto or cpu"
        )
    if config.lora.method == "full":
        problems |= _problems_of_full(config)
    if config.train.learning_rate == "auto" and config.data.validation == 0:
        problems["train.learning_rate"] = "auto chooses by validation loss, and data.validation is 0; give a number"
    if config.eval.forgetting_budget is not None and False in (config.eval.general, config.data.validation != 0):
        missing = "eval.general is false" if config.eval.general is False else "data.validation is 0"
        problems["eval.forgetting_budget"] = f"nothing is measured that it could be held against: {missing}"
    if wrong := list(space.problems_of(config)):
        problems["tune.space"] = "; ".join(wrong)
    if twice := {name for name in config.train.trackers if config.train.trackers.count(name) > 1}:
        problems["train.trackers"] = f"{', '.join(sorted(twice))} stands there twice; name each once"
    if config.train.kl_without_target and not config.train.kl_to_base:
        problems["train.kl_without_target"] = "has no effect while train.kl_to_base is 0; give that a weight"
    if "preference" in {config.data.format, *(source.format for source in config.data.sources)}:
        problems["data.format" if config.data.format == "preference" else "data.train"] = (
            "this version cannot train on preference pairs yet; to train on the chosen answers alone, set "
            "format: prompt-completion and fields: {completion: chosen}"
        )
    keys = {key for source in config.data.sources for key in source.fields or ()}
    if unknown := sorted(keys - FORMAT_KEYS):
        problems["data.fields"] = (
            f"no format has a key {shown(unknown[0])!r}; the keys are {', '.join(sorted(FORMAT_KEYS))}"
        )
    if config.data.prompt_template and "prompt" in keys:
        problems["data.prompt_template"] = "makes the prompt, and so does prompt in data.fields; leave one out"
    for name, wanted in (("validation", config.data.validation), ("test", config.data.test)):
        if isinstance(wanted, float) and not 0 <= wanted < 1:
            problems[f"data.{name}"] = f"a share must lie between 0 and 1, not {wanted} (a whole number counts rows)"
        elif isinstance(wanted, int) and wanted < 0:
            problems[f"data.{name}"] = f"must not be negative, not {wanted}"
    if config.data.test and not config.data.validation:
        problems["data.test"] = "has no use without validation rows, by which the best adapter is chosen"
    return problems
