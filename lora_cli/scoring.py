"""How good an answer is beside the one that was expected: what each row adds to the sums behind a figure."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, assert_never, get_args

import numpy as np

from lora_cli.errors import DataError, InputError, SurroundingsError, shown
from lora_cli.intervals import Figure, ratio
from lora_cli.time_limit import time_limit

Metric = Literal["exact-match", "json", "rouge-l", "bleu", "chrf"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LAST_NUMBER = "last-number"
SECONDS = 2.0  # that a regular expression may take on an answer
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Scored:
    """The sums of each row [rows, K] behind one figure."""

    name: str
    sums: np.ndarray
    figure: Figure = ratio


def score(metric: Metric, expected: Sequence[str], answers: Sequence[str], extract: str | None = None) -> list[Scored]:
    """Return what a metric says of answers. Raises SurroundingsError where its library is missing.

    `extract` is for the exact match alone: see `find`.
    """
    match metric:
        case "exact-match":
            wanted, given = ([find(text, extract) for text in texts] for texts in (expected, answers))
            hits = [found is not None and found == asked for asked, found in zip(wanted, given, strict=True)]
            return [Scored("exact_match", over_ones(hits))]
        case "json":
            return _json(expected, answers)
        case "rouge-l":
            scorer = _library("rouge_score").RougeScorer(["rougeL"])
            values = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(expected, answers, strict=True)]
            return [Scored("rouge_l", over_ones(values))]
        case "chrf":
            chrf = _library("sacrebleu").CHRF()
            values = [
                chrf.sentence_score(given, [asked]).score / 100 for asked, given in zip(expected, answers, strict=True)
            ]
            return [Scored("chrf", over_ones(values))]
        case "bleu":
            return [_bleu(expected, answers)]
        case _:
            assert_never(metric)


def over_ones(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return values beside ones, [rows, 2]: what a mean over rows is made of."""
    return np.stack([np.array(values, np.float64), np.ones(len(values))], axis=1)


def _library(name: Literal["rouge_score", "sacrebleu"]) -> Any:
    try:
        if name == "sacrebleu":
            import sacrebleu.metrics

            return sacrebleu.metrics
        from rouge_score import rouge_scorer  # type: ignore[import-untyped]  # it has none

        return rouge_scorer
    except ImportError:
        raise SurroundingsError(
            f"this metric needs {name}, which is not installed: pip install 'lora-cli[eval]'."
        ) from None


# --- exact match ---


def require_pattern(extract: str | None) -> None:
    """Raise InputError where `--extract` is no regular expression."""
    if extract is not None and extract != LAST_NUMBER:
        try:
            re.compile(extract)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"--extract: {shown(extract)!r} is no regular expression: {shown(error)}.") from None


def require_found(expected: Sequence[str], places: Sequence[str], extract: str | None) -> None:
    """Raise DataError naming the rows in whose expected answer `extract` finds nothing."""
    if lost := [place for text, place in zip(expected, places, strict=True) if find(text, extract) is None]:
        raise DataError(
            f"--extract: {shown(extract)!r} finds nothing in the expected answers of {len(lost)} of {len(places)} rows "
            f"({', '.join(lost[:3])})."
        )


def find(text: str, extract: str | None) -> str | None:
    """Return what is compared of a text: all of it, its last number, or the last match of a regular expression.

    Of a match it is the first group, where there is one. Numbers are compared by value: 1,000 is 1000.0. None where
    nothing is found. Raises InputError where the expression takes too long.
    """
    if extract is None:
        return text
    if extract == LAST_NUMBER:
        numbers = _NUMBER.findall(text)
        return _plain_number(numbers[-1]) if numbers else None
    try:
        with time_limit(SECONDS):
            matches = list(re.finditer(extract, text, re.MULTILINE))
    except TimeoutError:
        raise InputError(
            f"--extract: {shown(extract)!r} takes more than {SECONDS:.0f} seconds on one answer; a repetition inside a "
            "repetition, as in (a+)+, does so."
        ) from None
    if not matches:
        return None
    found: str = next(iter(matches[-1].groups()), None) or matches[-1].group()
    found = found.strip()
    return _plain_number(found) if _NUMBER.fullmatch(found) else found


def _plain_number(text: str) -> str:
    try:
        return format(Decimal(text.replace(",", "")).normalize(), "f")
    except InvalidOperation:
        return text


# --- JSON ---


def _json(expected: Sequence[str], answers: Sequence[str]) -> list[Scored]:
    """Return the share of answers that are JSON, and of the expected fields that they hold with the same value."""
    valid, fields = [], []
    for asked, given in zip(expected, answers, strict=True):
        wanted, found = _fields(asked), _fields(given)
        valid.append(float(found is not None))
        shared = sum((Counter(wanted or ()) & Counter(found or ())).values())
        fields.append((float(shared), float(len(wanted or ()))))
    if not any(of for _, of in fields) and fields:
        raise InputError("--metric json: none of the expected answers is JSON.")
    return [Scored("json_valid", over_ones(valid)), Scored("json_fields", np.array(fields).reshape(-1, 2))]


def _fields(text: str) -> list[str] | None:
    """Return every leaf of a JSON text as "path: value"; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return list(_leaves(value, ""))


def _leaves(value: Any, path: str) -> Sequence[str]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}")]
    if isinstance(value, list) and value:
        return [leaf for index, inner in enumerate(value) for leaf in _leaves(inner, f"{path}[{index}]")]
    return [f"{path}: {json.dumps(value)}"]


# --- BLEU ---


def _bleu(expected: Sequence[str], answers: Sequence[str]) -> Scored:
    """Return BLEU's sums: n-gram matches, n-gram totals, both lengths (Papineni et al. 2002; sacrebleu's tokens)."""
    bleu = _library("sacrebleu").BLEU(effective_order=True)  # of a row, it changes no sum
    rows = [bleu.sentence_score(given, [asked]) for asked, given in zip(expected, answers, strict=True)]
    sums = [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows]
    return Scored("bleu", np.array(sums, np.float64).reshape(len(rows), 10), _of_bleu(bleu.compute_bleu))


def _of_bleu(compute: Callable[..., Any]) -> Figure:
    def figure(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, 10).round().astype(int)
        scores = [compute(row[:4].tolist(), row[4:8].tolist(), int(row[8]), int(row[9])).score / 100 for row in flat]
        return np.array(scores).reshape(sums.shape[:-1])

    return figure
