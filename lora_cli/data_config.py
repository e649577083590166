"""The config's data section: what is learned, what is held out, and how rows become conversations."""

import datetime
import string
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from lora_cli.schema import Bool, Fixed, Float, Free, Int, Section, Text


def path_to_section(value: Any) -> Any:
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

    path: Text = Field(description="rows like those that must not be forgotten")
    ratio: Float = Field(0.05, gt=0, lt=1, description="of all tokens")


Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"]
# The keys that rows of some format have, which data.fields may find in other columns.
FORMAT_KEYS = frozenset(
    ("messages", "conversations", "instruction", "input", "output", "system", "tools", "prompt", "completion", "text")
)
Fields = Annotated[  # a format's key -> the column it stands in
    dict[str, Text], Field(json_schema_extra={"propertyNames": {"enum": sorted(FORMAT_KEYS)}})
]
PromptTemplate = Annotated[Text, AfterValidator(_columns_only)]


class SourceConfig(Section):
    """One of several sources of training rows."""

    path: Text = Field(description="a file, folder, glob or hub id")
    weight: Float = Field(1.0, gt=0, description="how often an epoch sees its rows")
    format: Format | None = Field(None, description="null: as data.format")
    subset: Text | None = Field(None, description='of a hub data set that has several (its "config name")')
    split: Text | None = Field(None, description="of a hub data set; null: train")
    fields: Fields | None = Field(None, description="null: as data.fields")
    prompt_template: PromptTemplate | None = Field(None, description="null: as data.prompt_template")


_Source = Annotated[SourceConfig, BeforeValidator(path_to_section, json_schema_input_type=Text | SourceConfig)]
HeldOut = Literal["test", "validation"]
HELD_OUT: tuple[HeldOut, ...] = get_args(HeldOut)  # in the order in which they are split off


class DataConfig(Section):
    """What is learned and what is held out."""

    train: Fixed[Text | Annotated[tuple[_Source, ...], Field(min_length=1)]] = Field(
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
