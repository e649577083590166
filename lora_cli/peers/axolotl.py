"""Axolotl's config: what its keys are here."""

from collections.abc import Iterator

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Peer, Rule, Source, Taken, Unsaid, is_off
from lora_cli.peers import axolotl_data, axolotl_keys, base_and_adapter, trainer, trainer_keys

_ADAPTER = base_and_adapter.AdapterKeys(
    "lora_r", "peft_use_dora", "peft_use_rslora", 8, lambda rank: 8
)  # PEFT's defaults


def is_full(source: Source) -> bool:
    """Return whether all weights are trained: there is no adapter."""
    return is_off(source.get("adapter"))


def _method(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of `adapter`, which is empty for full fine-tuning."""
    adapter = source.get("adapter")
    if is_full(source):
        yield Taken("adapter", adapter, "lora.method", "full", "no adapter: all weights are trained")
    elif adapter in ("lora", "qlora"):
        yield Taken("adapter", adapter, "lora.method", base_and_adapter.method(source, _ADAPTER))
    else:
        yield NotPossible("adapter", adapter, "lora, rslora, dora and full are there; lora is written", True)


def _targets(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that say which layers are adapted."""
    keys = ("lora_target_linear", "lora_target_modules")
    for key, value in source.given(*keys):
        if is_full(source):
            yield NotNeeded(key, value, "all weights are trained, so there is no adapter")
        elif key == "lora_target_linear" or source.get("lora_target_linear"):
            yield Taken(key, value, "lora.target_modules", "all-linear")
        elif isinstance(value, list):
            yield Taken(key, value, "lora.target_modules", [str(name) for name in value])
        else:
            why = "is a pattern; lora.target_modules takes all-linear or a list of names, all-linear is written"
            yield NotPossible(key, value, why, True)
    if not is_full(source) and not list(source.given(*keys)):
        yield Unsaid("lora.target_modules", "all-linear", "no layers are named there")


def _base_numbers(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that say in how many bits the frozen base is kept."""
    for key, value in source.given("load_in_4bit", "load_in_8bit"):
        if is_full(source):
            yield NotNeeded(key, value, "weights that are trained are float32 here")
        else:
            yield Taken(key, value, "model.quantization", "nf4" if key == "load_in_4bit" else "int8")


def _start(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the key that says where an adapter starts."""
    for key, value in source.given("peft_init_lora_weights"):
        if value is True or is_full(source):
            yield NotNeeded(key, value, "B starts at zero, as it does where nothing is said")
        elif str(value).startswith("pissa"):
            yield Taken(key, value, "lora.init", "pissa", "from an exact decomposition")
        else:
            yield NotPossible(key, value, "lora.init is default or pissa; default is written", True)


def _special_tokens(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of tokens that get other names: padding is never seen, and none are added."""
    for key, value in source.given("special_tokens"):
        names = [name for name, token in value.items() if token] if isinstance(value, dict) else [key]
        if others := [name for name in names if name != "pad_token"]:
            yield NotPossible(key, value, f"the tokenizer stays as it is, {', '.join(others)} too", True)
        else:
            yield NotNeeded(key, value, "padding is never trained, whatever its token")


def _trackers(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that send figures elsewhere."""
    switches = {"wandb": ("use_wandb", "wandb_project"), "mlflow": ("use_mlflow",), "tensorboard": ("use_tensorboard",)}
    on = {name: list(source.given(*keys)) for name, keys in switches.items()}
    if source.get("wandb_mode") == "disabled":
        yield from (NotNeeded(*one, "wandb_mode: disabled") for one in on.pop("wandb"))
    trackers = [name for name, given in on.items() if given]
    yield from (Taken(*one, "train.trackers", trackers) for name in trackers for one in on[name])


AXOLOTL = Peer(
    name="Axolotl",
    page="docs/from-axolotl.md",
    must_have="base_model",
    marks=frozenset(("adapter", "datasets", "pretraining_dataset", "micro_batch_size", "sequence_len", "lora_r")),
    same={
        "base_model": "model.path",
        "revision_of_model": "model.revision",
        "learning_rate": "train.learning_rate",
        "weight_decay": "train.weight_decay",
        "max_grad_norm": "train.max_grad_norm",
        "neftune_noise_alpha": "train.neftune_alpha",
        "seed": "seed",
        "output_dir": "output_dir",
    },
    rules=(
        Rule(("adapter",), ("lora.method",), _method),
        base_and_adapter.adapter(_ADAPTER, is_full),
        Rule(("lora_target_modules", "lora_target_linear"), ("lora.target_modules",), _targets),
        Rule(("peft_init_lora_weights",), ("lora.init",), _start),
        Rule(("load_in_4bit", "load_in_8bit"), ("model.quantization",), _base_numbers),
        base_and_adapter.precision(("bf16", "fp16", "bfloat16", "float16", "float32"), is_full, float32_when_off=True),
        base_and_adapter.remote_code("revision_of_model"),
        *axolotl_data.RULES,
        trainer.batch("micro_batch_size", 1, ("sample_packing", "batch_flattening"), whole="batch_size"),
        trainer.epochs("num_epochs", 1),
        trainer.schedule("lr_scheduler", "cosine", 0.03),
        trainer.evaluations("early_stopping_patience", "num_epochs", "evals_per_epoch", axolotl_data.holds_out),
        trainer.saves("num_epochs", "saves_per_epoch"),
        trainer.switch("gradient_checkpointing", "train.activation_checkpointing"),
        trainer.switch("torch_compile", "train.compile"),
        base_and_adapter.sharding("fsdp", "fsdp_config", "fsdp_version", "dp_shard_size"),
        Rule(("use_wandb", "wandb_project", "use_mlflow", "use_tensorboard"), ("train.trackers",), _trackers),
        Rule(("special_tokens",), (), _special_tokens),
        trainer.resume("resume_from_checkpoint", "auto_resume_from_checkpoints"),
    ),
    fixed={**trainer_keys.FIXED, **axolotl_keys.FIXED},
    not_needed={**trainer_keys.NOT_NEEDED, **axolotl_keys.NOT_NEEDED},
    not_possible={**trainer_keys.NOT_POSSIBLE, **axolotl_keys.NOT_POSSIBLE},
    other_training={**trainer_keys.OTHER_TRAINING, **axolotl_keys.OTHER_TRAINING},
)
