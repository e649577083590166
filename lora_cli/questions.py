"""Held-out rows as questions: the prompts a model is asked, what it answers, and which of some options it prefers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_cli import examples
from lora_cli.distributed import ALONE, World
from lora_cli.ends import end_tokens
from lora_cli.errors import DataError
from lora_cli.evaluate import measure
from lora_cli.examples import IGNORED, Example, Tokenizer
from lora_cli.general import spread
from lora_cli.generate import Sampling, generate
from lora_cli.model import LanguageModel

MOST_OPTIONS = 200
_AT_ONCE = 256  # sequences of options that are measured together
_MORE = 8  # tokens an answer may be longer than the longest expected one


@dataclass(frozen=True)
class Question:
    """A row up to its last answer, and that answer with its end token."""

    where: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def questions_of(held_out: Sequence[Example], most: int) -> list[Question]:
    """Return at most so many rows as questions, spread evenly over the set; rows with nothing to ask are left out."""
    possible = [Question(each.where, *parts) for each in held_out if (parts := examples.last_answer(each))]
    return [possible[index] for index in spread(len(possible), most)] if possible and most else []


def units_of(questions: Sequence[Question]) -> np.ndarray:
    """Return the number of the unit of each question: those with the same prompt are one."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(each.prompt, len(numbers)) for each in questions], np.int64)


def expected_texts(model: LanguageModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[str]:
    """Return the expected answers as text."""
    return [text_of(tokenizer, each.answer, end_tokens(model, tokenizer)) for each in questions]


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    max_positions: int | None,
    sampling: Sampling,
    max_new_tokens: int | None,
    world: World = ALONE,
) -> list[str]:
    """Return what the model answers; a prompt that comes again is asked once. Ranks share the prompts."""
    if not questions:
        return []
    prompts = list(dict.fromkeys(each.prompt for each in questions))
    length = max_new_tokens or max(len(each.answer) for each in questions) + _MORE
    ids = generate(model, tokenizer, prompts, length, max_positions, sampling, world)
    of_prompt = dict(zip(prompts, (text_of(tokenizer, each, ()) for each in ids), strict=True))
    return [of_prompt[each.prompt] for each in questions]


def text_of(tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int]) -> str:
    """Return tokens as text, end tokens and white space at both ends aside."""
    while ids and ids[-1] in ends:
        ids = ids[:-1]
    return tokenizer.decode(ids).strip()


def options_of(held_out: Sequence[Example]) -> list[tuple[int, ...]]:
    """Return the different answers of a set. Raises DataError where these are no options to choose among."""
    found = {parts[1] for each in held_out if (parts := examples.last_answer(each))}
    if not 2 <= len(found) <= MOST_OPTIONS:
        raise DataError(
            f"--metric label: the held-out rows have {len(found)} different answers; 2 to {MOST_OPTIONS} can be "
            "options."
        )
    return sorted(found)


def choose(
    model: LanguageModel,
    questions: Sequence[Question],
    options: Sequence[tuple[int, ...]],
    tokens: int,
    gains: Sequence[float],
    world: World = ALONE,
) -> np.ndarray:
    """Return, for each gain, whether the most likely option is the right one: [gains, questions] of 0 and 1.

    An option's likelihood is that of all its tokens, its end token included. A prompt runs once for all its options.
    """
    hits: list[list[np.ndarray]] = [[] for _ in gains]
    size = max(1, _AT_ONCE // len(options))
    for begin in range(0, len(questions), size):
        some = questions[begin : begin + size]
        sequences = [
            Example((*each.prompt, *option), (*(IGNORED,) * len(each.prompt), *option), each.where)
            for each in some
            for option in options
        ]
        right = np.array([options.index(each.answer) for each in some])
        for found, measured in zip(hits, measure(model, sequences, tokens, gains, world), strict=True):
            found.append(measured.loss.reshape(len(some), -1).argmin(1) == right)
    return np.stack([np.concatenate([np.empty(0), *each]) for each in hits])
