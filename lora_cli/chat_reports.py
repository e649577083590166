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

    adapter: Path
    prompt: str
    answer: str
    finish_reason: FinishReason
    prompt_tokens: int
    tokens: int
    first_seconds: float | None
    seconds: float
    tokens_per_second: float | None
    gain: float
    temperature: float
    top_p: float
    top_k: int
    seed: int
    templated: bool  # whether the question went through the chat template


@dataclass(frozen=True)
class ServeReport:
    """Where a server answers, and by which names."""

    url: str
    models: list[str]
