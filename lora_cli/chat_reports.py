"""What chat and serve report, as plain frozen records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Said:
    """An answer, and how it came about. It ended by itself, at its longest, or because somebody asked to stop."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int  # of the prompt, which the key-value cache held already
    left_out_turns: int  # the oldest, for which there was no room
    tokens: int  # the end token included
    first_seconds: float | None  # until the first token; null where none came
    seconds: float
    tokens_per_second: float | None  # of the tokens after the first
    gain: float


@dataclass(frozen=True)
class ChatReport:
    """One question and its answer."""

    adapter: Path  # that answered
    prompt: str  # the question, as it was given
    answer: str  # what came, without the end token
    finish_reason: FinishReason  # it ended by itself, at its longest, or because somebody asked to stop
    prompt_tokens: int  # that the model read
    tokens: int  # of the answer, the end token included
    first_seconds: float | None  # until the first token; null where none came
    seconds: float  # until the last
    tokens_per_second: float | None  # of the tokens after the first; null: there are none
    gain: float  # how strong the adapter was: 1 as it is, 0 the base
    temperature: float  # --temperature
    top_p: float  # --top-p
    top_k: int  # --top-k
    seed: int  # --seed
    templated: bool  # whether the question went through the chat template


@dataclass(frozen=True)
class ServeReport:
    """Where a server answers. It is printed when it does; then it serves until it is stopped."""

    url: str  # what clients take as base_url
    models: list[str]  # names that it answers by; the last is the base's
