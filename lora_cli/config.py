"""RunConfig: what to do. Parsed once, frozen, every default written out; two equal configs are the same run.

The description of each field is the comment `lora init` writes and the text editors show from the JSON Schema.
"""

import datetime
import string
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class OnResume(Enum):
    """What becomes of a run that goes on with another value of a key; each key says which."""

    FREE = "nothing that is computed changes"
    NOTED = "sums may be rounded in another way: said, and written down"
    OVERRIDE = "the rest is trained in another way: only with --override, and written down"
    FIXED = "it would be another run: only in another output_dir"


T = TypeVar("T")
Free = Annotated[T, OnResume.FREE]
Noted = Annotated[T, OnResume.NOTED]
Override = Annotated[T, OnResume.OVERRIDE]
Fixed = Annotated[T, OnResume.FIXED]


def _reject_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


# Strict: "8" is no number, true is no number, 1.5 is no whole number; nan and inf are refused.
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
Text = Annotated[str, AfterValidator(_reject_empty)]


class Section(BaseModel):
    """A frozen part of the config that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """The frozen base model."""

    path: Fixed[Text] = Field(description="hub id or folder")
    revision: Fixed[Text | None] = Field(None, description="pin a hub revision")
    dtype: Fixed[Literal["auto", "float32", "bfloat16", "float16"]] = Field(
        "auto",
        description="auto | float32 | bfloat16 | float16: of the frozen base; adapters are always float32",
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
        "lora", description="lora: scale alpha/rank | rslora: scale alpha/sqrt(rank) | dora | full"
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
    def written_rank(self) -> int:
        """The rank of the adapter that is written: PiSSA's holds where it started, to be taken off, too."""
        return self.rank * (2 if self.init == "pissa" else 1)


def _path_to_section(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _iso_date(value: str) -> str:
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError("a date such as 2026-01-01") from None


def _columns_only(template: str) -> str:
    """Refuse a prompt template that is more than text with {column} in it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is no template ({error}); write {{{{ for a brace that stands for itself") from None
    names = [(name, spec or how) for _, name, spec, how in parts if name is not None]
    if wrong := [name for name, more in names if not name or more]:
        raise ValueError(f"may hold only plain {{column}} names, not {{{wrong[0]}}}")
    if not names:
        raise ValueError("names no {column}, so every prompt would be the same")
    return template


class ReplayConfig(Section):
    """General data mixed in against forgetting."""

    path: Text
    ratio: Float = Field(0.05, gt=0, lt=1)


Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"]
# The keys that rows of some format have, which data.fields may find in other columns.
FORMAT_KEYS = frozenset(
    ("messages", "conversations", "instruction", "input", "output", "system", "tools", "prompt", "completion", "text")
)
Fields = dict[str, Text]  # a format's key -> the column it stands in
PromptTemplate = Annotated[Text, AfterValidator(_columns_only)]


class SourceConfig(Section):
    """One of several sources of training rows."""

    path: Text
    weight: Annotated[Float, Field(gt=0)] = 1.0
    format: Format | None = None  # null: as data.format
    subset: Text | None = None  # of a hub data set that has several (its "config name")
    split: Text | None = None  # of a hub data set; null: train
    fields: Fields | None = None  # null: as data.fields
    prompt_template: PromptTemplate | None = None  # null: as data.prompt_template


HeldOut = Literal["test", "validation"]
HELD_OUT: tuple[HeldOut, ...] = get_args(HeldOut)  # in the order in which they are split off


class DataConfig(Section):
    """What is learned and what is held out."""

    train: Fixed[
        Text | Annotated[tuple[Annotated[SourceConfig, BeforeValidator(_path_to_section)], ...], Field(min_length=1)]
    ] = Field(
        description="a file (jsonl, json, csv, parquet; .gz, .zst), folder, glob, hub id, or a list of {path, weight}"
    )
    validation: Fixed[Int | Float | Text] = Field(
        0.1, description="a share of train, a number of rows, a file or a hub split; 0 turns validation off"
    )
    test: Fixed[Int | Float | Text | None] = Field(
        None, description="rows kept for the final report alone, as validation: share, number, file or hub split"
    )
    split_by: Fixed[Text] = Field(
        "prompt",
        description="prompt | row | a field: rows that share it stay on one side of the split",
    )
    allow_overlap: Free[Bool] = Field(False, description="accept validation rows whose prompt is also trained on")
    format: Fixed[Format] = Field(
        "auto", description="auto | messages | sharegpt | alpaca | prompt-completion | text | preference"
    )
    fields: Fixed[Fields | None] = Field(
        None, description="other names of columns, as {prompt: question, completion: answer}"
    )
    prompt_template: Fixed[PromptTemplate | None] = Field(
        None, description='makes the prompt out of columns, as "Question: {question}\\nAnswer:"'
    )
    chat_template: Fixed[Text | None] = Field(
        None, description="null: the model's own | a Jinja file | chatml | zephyr | alpaca"
    )
    template_date: Fixed[Annotated[Text, AfterValidator(_iso_date)]] = Field(
        "2026-01-01", description="the day a chat template is told, where it writes today's"
    )
    merge_system: Fixed[Bool] = Field(
        False, description="put a system message in front of the first user message, for templates without that role"
    )
    allow_control_tokens: Fixed[Bool | None] = Field(
        None, description="false: control tokens inside content are text | true: they are control tokens | null: asks"
    )
    max_length: Fixed[Int] = Field(2048, ge=2, description="tokens")
    too_long: Fixed[Literal["error", "drop", "truncate"]] = Field(
        "error", description="error | drop | truncate: never cuts an answer silently"
    )
    replay: Fixed[ReplayConfig | None] = Field(
        None, description="{path: general.jsonl, ratio: 0.05}: general data mixed in against forgetting"
    )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of training rows, with what they leave out filled in."""
        named = (SourceConfig(path=self.train),) if isinstance(self.train, str) else self.train
        return tuple(self.source(one) for one in named)

    def source(self, one: SourceConfig) -> SourceConfig:
        """Return a source with the settings of the whole data section where it has none of its own."""
        inherited = ("format", "fields", "prompt_template")
        return one.model_copy(update={name: getattr(one, name) or getattr(self, name) for name in inherited})

    @property
    def group_field(self) -> str | None:
        """The field whose values are kept on one side when rows are split off."""
        split_off = any(wanted and not isinstance(wanted, str) for wanted in (self.validation, self.test))
        return self.split_by if split_off and self.split_by not in ("prompt", "row") else None


class EarlyStoppingConfig(Section):
    """When to give up on getting better."""

    patience: Override[Int | None] = Field(3, ge=1, description="evaluations without improvement; null turns it off")
    min_delta: Override[Float] = Field(0.0, ge=0, description="smaller gains in validation loss do not count")


class TrainConfig(Section):
    """The training loop."""

    epochs: Override[Int] = Field(3, ge=1, description="passes over the training data")
    max_steps: Override[Int | None] = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: Fixed[Int] = Field(16, ge=1, description="examples per optimizer step, over all processes")
    learning_rate: Override[Annotated[Float, Field(gt=0)] | Literal["auto"]] = Field(
        3e-4, description="the peak, reached after warm-up; or auto"
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


class RunConfig(Section):
    """One training run."""

    model: Annotated[ModelConfig, BeforeValidator(_path_to_section)]
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    seed: Fixed[Int] = Field(
        0, ge=0, lt=2**63, description="data order, adapter initialisation and dropout follow from it"
    )
    output_dir: Free[Text] = Field(description="where the run is written")


def flat(config: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (dotted key, value) of every leaf."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
