"""LLaMA-Factory's config: what its keys are here."""

from collections.abc import Iterator

from lora_cli.conversion import NotNeeded, NotPossible, Outcome, Peer, Rule, Source, Taken, Unsaid
from lora_cli.peers import base_and_adapter, llamafactory_data, llamafactory_keys, trainer, trainer_keys

_ADAPTER = base_and_adapter.AdapterKeys("lora_rank", "use_dora", "use_rslora", 8, lambda rank: 2 * rank)


def is_full(source: Source) -> bool:
    """Return whether all weights are trained."""
    return bool(source.get("finetuning_type", "lora") == "full")


def _method(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the key that says what is trained."""
    for key, value in source.given("finetuning_type"):
        if value in ("lora", "full"):
            yield Taken(
                key, value, "lora.method", "full" if value == "full" else base_and_adapter.method(source, _ADAPTER)
            )
        else:
            yield NotPossible(key, value, "lora, rslora, dora and full are there; lora is written", True)


def _targets(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the key that says which layers are adapted: `all`, or names with commas."""
    for key, value in source.given("lora_target"):
        names = [name.strip() for name in str(value).split(",") if name.strip()]
        if is_full(source):
            yield NotNeeded(key, value, "all weights are trained, so there is no adapter")
        else:
            yield Taken(key, value, "lora.target_modules", "all-linear" if names == ["all"] else names)


def _start(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of PiSSA's keys: here the start is exact, and the base stays what it was."""
    for key, value in source.given("pissa_init", "pissa_iter", "pissa_convert"):
        if key == "pissa_init" and not is_full(source):
            yield Taken(key, value, "lora.init", "pissa")
        else:
            yield NotNeeded(key, value, "the decomposition is exact, and what is written adds to the base as it was")


def _base_numbers(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that say in how many bits the frozen base is kept."""
    kinds: dict[float, str] = {4: "nf4", 8: "int8"}
    for key, value in source.given("quantization_bit"):
        method, kind = str(source.get("quantization_method", "bnb")), source.get("quantization_type", "nf4")
        if is_full(source):
            yield NotNeeded(key, value, "weights that are trained are float32 here")
        elif (ours := kinds.get(source.number(key) or 0)) and (ours == "int8" or kind == "nf4"):
            differs = None if method in ("bnb", "bitsandbytes") else f"by bitsandbytes, not {method}"
            yield Taken(key, value, "model.quantization", ours, differs)
        else:
            yield NotPossible(key, value, "model.quantization is nf4 or int8; none is written", True)
    for one in source.given("quantization_method", "quantization_type", "double_quantization"):
        yield NotNeeded(*one, "model.quantization says which: nf4 with doubly quantised scales, or int8")


def _rate(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the learning rate, whose default there is that of transformers."""
    if source.get("learning_rate") is None:
        yield Unsaid("train.learning_rate", 5e-5, "their default")
    else:
        rate = source.number("learning_rate")
        yield Taken("learning_rate", source.get("learning_rate"), "train.learning_rate", rate)


def _trackers(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the key that sends figures elsewhere."""
    known = ("tensorboard", "wandb", "mlflow")
    for key, value in source.given("report_to"):
        named = [str(name) for name in value] if isinstance(value, list) else str(value).split(",")
        trackers = [name.strip() for name in named if name.strip() in known]
        if trackers:
            yield Taken(key, value, "train.trackers", trackers)
        else:
            yield NotPossible(key, value, "every number is in the run's metrics.jsonl", False)


def _checkpointing(source: Source) -> Iterator[Outcome]:
    """Iterate over what becomes of the keys that keep fewer activations, which is their default."""
    for key, value in source.given("gradient_checkpointing", "use_unsloth_gc"):
        yield Taken(key, value, "train.activation_checkpointing", True)
    for one in source.given("disable_gradient_checkpointing"):
        yield Taken(*one, "train.activation_checkpointing", False)


LLAMA_FACTORY = Peer(
    name="LLaMA-Factory",
    page="docs/from-llamafactory.md",
    must_have="model_name_or_path",
    marks=frozenset(("stage", "finetuning_type", "template", "cutoff_len", "lora_target", "dataset_dir")),
    same={
        "model_name_or_path": "model.path",
        "model_revision": "model.revision",
        "weight_decay": "train.weight_decay",
        "max_grad_norm": "train.max_grad_norm",
        "neftune_noise_alpha": "train.neftune_alpha",
        "seed": "seed",
        "output_dir": "output_dir",
    },
    rules=(
        Rule(("finetuning_type",), ("lora.method",), _method),
        base_and_adapter.adapter(_ADAPTER, is_full),
        Rule(("lora_target",), ("lora.target_modules",), _targets),
        Rule(("pissa_init", "pissa_iter", "pissa_convert"), ("lora.init",), _start),
        Rule(
            ("quantization_bit", "quantization_method", "quantization_type", "double_quantization"),
            ("model.quantization",),
            _base_numbers,
        ),
        base_and_adapter.precision(("bf16", "fp16", "pure_bf16"), is_full, float32_when_off=False),
        base_and_adapter.remote_code("model_revision"),
        *llamafactory_data.RULES,
        Rule(("learning_rate",), ("train.learning_rate",), _rate),
        trainer.batch("per_device_train_batch_size", 8, ("packing", "neat_packing")),
        trainer.epochs("num_train_epochs", 3),
        trainer.schedule("lr_scheduler_type", "linear", 0.0),
        trainer.evaluations("early_stopping_steps", "num_train_epochs", None, llamafactory_data.holds_out),
        trainer.saves("num_train_epochs", None),
        Rule(
            ("gradient_checkpointing", "use_unsloth_gc", "disable_gradient_checkpointing"),
            ("train.activation_checkpointing",),
            _checkpointing,
        ),
        trainer.switch("torch_compile", "train.compile"),
        base_and_adapter.sharding("fsdp", "fsdp_config"),
        Rule(("report_to",), ("train.trackers",), _trackers),
        trainer.resume("resume_from_checkpoint"),
    ),
    fixed={**trainer_keys.FIXED, **llamafactory_keys.FIXED},
    not_needed={**trainer_keys.NOT_NEEDED, **llamafactory_keys.NOT_NEEDED},
    not_possible={**trainer_keys.NOT_POSSIBLE, **llamafactory_keys.NOT_POSSIBLE},
    other_training={**trainer_keys.OTHER_TRAINING, **llamafactory_keys.OTHER_TRAINING},
)
