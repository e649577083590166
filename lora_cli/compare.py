"""`lora eval`: base and adapter side by side on the same held-out tokens and prompts."""

import math
from collections.abc import Sequence
from pathlib import Path

from lora_cli import examples, lora, run_dir, tuned
from lora_cli.config import DataConfig, SourceConfig
from lora_cli.data_reader import DataReader, run_to_end, validation_of
from lora_cli.dataset import Dataset
from lora_cli.distributed import current_world
from lora_cli.errors import DataError
from lora_cli.evaluate import Measured, measure
from lora_cli.examples import Example, Tokenizer
from lora_cli.generate import greedy
from lora_cli.memory import tokens_worth_it
from lora_cli.model import LanguageModel, end_tokens
from lora_cli.records import DataCounts, EvalReport, Sample, Score
from lora_cli.tuned import Result


def compare(path: Path, data_path: str | None, base: str | None, most_answers: int) -> EvalReport:
    """Measure base and adapter on `data_path`, or on the run's own validation rows.

    Loss, perplexity and token accuracy are over every target; exact match is over at most `most_answers` rows, spread
    evenly, each answered greedily and compared with its last answer, spaces at both ends aside.
    """
    result = tuned.find(path, base)
    held_out, counts, name = _held_out(result, data_path)
    loaded = tuned.load(result, current_world().device)
    tokens = tokens_worth_it(loaded.device)
    tokenizer = result.header.tokenizer

    asked = _asked(held_out, most_answers)
    expected = [_text(tokenizer, answer, end_tokens(loaded, tokenizer)) for _, _, answer in asked]
    losses, answers = {}, {}
    for gain in (0.0, 1.0):
        with lora.gain(loaded.module, gain):
            (losses[gain],) = measure(loaded, held_out, tokens, (gain,))
            answers[gain] = _answers(loaded, tokenizer, asked, result.header.max_positions)
    samples = [
        Sample(example.where, wanted, base_text, tuned_text)
        for (example, _, _), wanted, base_text, tuned_text in zip(
            asked, expected, answers[0.0], answers[1.0], strict=True
        )
    ]
    return EvalReport(
        adapter=result.adapter.folder,
        data=name,
        rows=counts.rows,
        base=_score(losses[0.0], expected, answers[0.0]),
        tuned=_score(losses[1.0], expected, answers[1.0]),
        samples=samples,
    )


def _held_out(result: Result, data_path: str | None) -> tuple[Dataset, DataCounts, str]:
    if data_path is not None:
        source = SourceConfig(path=data_path)
        settings = result.data or DataConfig(train=data_path)
        reader = DataReader(settings, result.header)
        return *run_to_end(reader.held_out(settings.source(source))), data_path
    if result.config is None or result.data is None:
        raise DataError(f"{result.adapter.folder}: belongs to no run with validation rows; give --data FILE.")
    if result.config.data.validation == 0:
        raise DataError("The run had no validation rows (data.validation: 0); give --data FILE.")
    held_out, counts = run_to_end(validation_of(result.data, result.config.seed, result.header))
    assert result.run is not None, "it has a config"
    before = run_dir.read_environment(result.run).get("validation_fingerprint")
    if before not in (None, held_out.fingerprint()):
        raise DataError(
            f"{result.run.path}: the data changed since this run, so its validation rows cannot be told from those it "
            "was trained on. Put it back, or give --data FILE."
        )
    return held_out, counts, "the run's validation rows"


def _asked(held_out: Sequence[Example], most: int) -> list[tuple[Example, tuple[int, ...], tuple[int, ...]]]:
    """Return (example, prompt ids, answer ids) of the rows to be answered, spread evenly over the set."""
    possible = [(example, *parts) for example in held_out if (parts := examples.last_answer(example))]
    count = min(most, len(possible))
    return [possible[index * len(possible) // count] for index in range(count)]


def _answers(
    loaded: LanguageModel,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Example, tuple[int, ...], tuple[int, ...]]],
    max_positions: int | None,
) -> list[str]:
    if not asked:
        return []
    longest = max(len(answer) for _, _, answer in asked)
    ids = greedy(loaded, tokenizer, [prompt for _, prompt, _ in asked], longest + 8, max_positions)
    return [_text(tokenizer, answer, ()) for answer in ids]


def _text(tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int]) -> str:
    while ids and ids[-1] in ends:
        ids = ids[:-1]
    return tokenizer.decode(ids).strip()


def _score(loss: Measured, expected: Sequence[str], answers: Sequence[str]) -> Score:
    exact = sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True))
    return Score(
        loss=loss.mean("loss"),
        perplexity=math.exp(min(loss.mean("loss"), 700)),
        token_accuracy=loss.mean("correct"),
        targets=int(loss.targets.sum()),
        exact_match=exact / len(expected) if expected else None,
        exact=exact,
        answers=len(expected),
    )
