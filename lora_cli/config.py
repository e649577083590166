"""RunConfig: what to do. Parsed once, frozen, every default written out; two equal configs are the same run.

The description of each field is the comment `lora init` writes and the text editors show from the JSON Schema.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lora_cli.data_config import DataConfig, path_to_section
from lora_cli.schema import Bool, Fixed, Float, Free, Int, Noted, Override, Section, Text


class ModelConfig(Section):
    """The frozen base model."""

    path: Fixed[Text] = Field(description="hub id or folder")
    revision: Fixed[Text | None] = Field(None, description="pin a hub revision")
    dtype: Fixed[Literal["auto", "float32", "bfloat16", "float16"]] = Field(
        "auto",
        description="auto | float32 | bfloat16 | float16: of the frozen base; what is trained is always float32",
    )
    quantization: Fixed[Literal["nf4", "int8"] | None] = Field(
        None, description="null | nf4 | int8: of the frozen base"
    )
    device: Noted[Literal["auto", "cpu", "cuda", "mps"]] = Field(
        "auto", description="auto | cpu | cuda: what it runs on; auto is a GPU where torch sees one"
    )
    trust_remote_code: Fixed[Bool] = Field(False, description="run Python code that comes with the model")


class LoraConfig(Section):
    """The adapter."""

    method: Fixed[Literal["lora", "rslora", "dora", "full"]] = Field(
        "lora",
        description="lora: scale alpha/rank | rslora: scale alpha/sqrt(rank) | dora | full: no adapter, all weights",
    )
    init: Fixed[Literal["default", "pissa"]] = Field(
        "default",
        description="default | pissa: start from the base's largest singular vectors; wants a tenth of the usual rate",
    )
    rank: Fixed[Int] = Field(32, ge=1, description="size of the low-rank update")
    alpha: Fixed[Float] = Field(32, gt=0, description="scale of the update, divided by the rank")
    dropout: Override[Float] = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    target_modules: Fixed[Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]] = Field(
        "all-linear",
        description="all-linear, or a list of names as they stand in the model (q_proj, down_proj, ...)",
    )

    @property
    def plain_alpha(self) -> float:
        """The alpha of plain LoRA with the same scale."""
        return self.alpha * (math.sqrt(self.rank) if self.method == "rslora" else 1.0)

    @property
    def written_rank(self) -> int:
        """The rank of the adapter that is written: PiSSA's holds where it started, to be taken off, too."""
        return self.rank * (2 if self.init == "pissa" else 1)


FULL_LEARNING_RATE = 3e-5


class EarlyStoppingConfig(Section):
    """When to give up on getting better."""

    patience: Override[Int | None] = Field(3, ge=1, description="evaluations without improvement; null turns it off")
    min_delta: Override[Float] = Field(0.0, ge=0, description="smaller gains in validation loss do not count")


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class TrainConfig(Section):
    """The training loop."""

    epochs: Override[Int] = Field(3, ge=1, description="passes over the training data")
    max_steps: Override[Int | None] = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: Fixed[Int] = Field(16, ge=1, description="examples per optimizer step, over all processes")
    learning_rate: Override[Annotated[Float, Field(gt=0)] | Literal["auto"]] = Field(
        3e-4, description="the peak, reached after warm-up; or auto; left out, full has 3e-5"
    )
    loraplus_ratio: Override[Annotated[Float, Field(gt=0)]] = Field(
        1.0, description="learning rate of lora_B over that of lora_A (LoRA+), 16 for example; 1 is plain LoRA"
    )
    schedule: Override[Literal["cosine", "linear", "constant"]] = Field(
        "cosine", description="cosine | linear | constant"
    )
    warmup_ratio: Override[Float] = Field(0.03, ge=0, lt=1, description="share of all steps spent warming up")
    weight_decay: Override[Float] = Field(0.0, ge=0, description="decoupled, as in AdamW")
    max_grad_norm: Override[Float] = Field(1.0, gt=0, description="gradients are clipped to this norm")
    max_loss_jump: Override[Float | None] = Field(
        None,
        gt=1,
        description="stop at a step whose loss is so many times that of the last 32, 4 for example; null: never",
    )
    micro_batch_tokens: Noted[Annotated[Int, Field(ge=1)] | Literal["auto"]] = Field(
        "auto", description="tokens one forward sees"
    )
    order: Fixed[Literal["rows", "prompts"]] = Field(
        "rows", description="rows: shuffled one by one | prompts: rows with the same prompt stay together"
    )
    share_prefixes: Noted[Bool] = Field(
        True, description="run once what rows of a step begin with alike; changes no number"
    )
    activation_checkpointing: Noted[Bool] = Field(
        False, description="compute activations again instead of keeping them: less memory, more time"
    )
    compile: Noted[Bool] = Field(
        False, description="torch.compile the model's blocks: for long runs, on a GPU above all"
    )
    shard: Noted[Bool] = Field(
        False, description="each process keeps a part of the frozen base (FSDP), for bases too large for one device"
    )
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    kl_to_base: Override[Float] = Field(0.0, ge=0, description="weight of KL(base || tuned), against forgetting")
    kl_without_target: Override[Bool] = Field(False, description="leave the target token out of both sides of that KL")
    surprise_limit: Override[Float | None] = Field(
        None, gt=0, description="nats: leave out targets the base finds more surprising, 4 for example; null is none"
    )
    neftune_alpha: Override[Float | None] = Field(
        None, gt=0, description="noise on the embeddings while training (NEFTune), 5 for example; null is none"
    )
    trackers: Free[tuple[TrackerName, ...]] = Field(
        (), description="where else the run's figures go: any of [tensorboard, wandb, mlflow]"
    )


class EvalConfig(Section):
    """What is measured during training."""

    per_epoch: Override[Int] = Field(4, ge=1, description="validation passes in an epoch")
    general: Fixed[Text | Literal[False] | None] = Field(
        None, description="general text to measure forgetting on; null: a small one of ours | false: not measured"
    )
    general_tokens: Fixed[Int] = Field(4096, ge=256, description="so many tokens of it are used")
    forgetting_budget: Override[Float | None] = Field(
        None,
        gt=0,
        description="largest allowed rise of loss on it: part of stopping and of choosing the best",
    )

    @property
    def general_source(self) -> str | None:
        """The general text that the user names; None for ours, and where none is wanted."""
        return self.general or None


class SaveConfig(Section):
    """When checkpoints are written."""

    per_epoch: Free[Int] = Field(4, ge=1, description="checkpoints in an epoch")
    keep: Free[Int] = Field(2, ge=1, description="newest valid checkpoints kept, beside the best")


class Range(Section):
    """Values between which lora tune searches; whole numbers for keys that take only those."""

    low: Int | Float = Field(description="the smallest value")
    high: Int | Float = Field(description="the largest value")
    log: Bool = Field(False, description="even in the logarithm")


Choices = Annotated[tuple[Any, ...], Field(min_length=1)]


class TuneConfig(Section):
    """What lora tune searches."""

    trials: Free[Int] = Field(20, ge=1, description="runs that are tried")
    budget: Free[Float] = Field(
        0.33, gt=0, le=1, description="share of a run's steps that each trial gets; the best is then trained whole"
    )
    space: Free[Annotated[dict[Text, Range | Choices], Field(min_length=1)] | None] = Field(
        None, description="{key: {low: 1e-4, high: 1e-2, log: true}, key: [8, 32]}; null: learning rate and rank"
    )
    objective: Free[Literal["loss", "loss-and-forgetting"]] = Field(
        "loss", description="loss: of validation, within eval.forgetting_budget | loss-and-forgetting: both, no pruning"
    )
    prune: Free[Bool] = Field(True, description="give up trials that are behind at a ninth and a third of their steps")
    storage: Free[Text | None] = Field(
        None, description="where the study lies: a journal file, or a database's URL; null: a journal in output_dir"
    )


class RunConfig(Section):
    """One training run."""

    model: Annotated[ModelConfig, BeforeValidator(path_to_section, json_schema_input_type=Text | ModelConfig)]
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    tune: TuneConfig = TuneConfig()
    seed: Fixed[Int] = Field(
        0, ge=0, lt=2**63, description="data order, adapter initialisation and dropout follow from it"
    )
    output_dir: Free[Text] = Field(description="where the run is written")

    @model_validator(mode="after")
    def _fill_in_what_the_method_says(self) -> Self:
        """Full fine-tuning wants about a tenth of LoRA's rate (LoRA Without Regret), and weights in float32."""
        if self.lora.method == "full":
            rate = {} if "learning_rate" in self.train.model_fields_set else {"learning_rate": FULL_LEARNING_RATE}
            dtype = {"dtype": "float32"} if self.model.dtype == "auto" else {}
            for name, section, filled in (("train", self.train, rate), ("model", self.model, dtype)):
                object.__setattr__(self, name, section.model_copy(update=filled))  # it is frozen when it is whole
        return self
