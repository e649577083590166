"""`lora eval`: base and adapter side by side on the same held-out tokens and prompts, each figure with its interval."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lora_cli import intervals, manifest, scoring, storage, tuned, tuning
from lora_cli.distributed import World, joined
from lora_cli.errors import InputError
from lora_cli.evaluate import BASE_AND_ADAPTER, Measured, measure
from lora_cli.examples import Example
from lora_cli.forgetting import forgetting
from lora_cli.generate import GREEDY, Sampling
from lora_cli.held_out import general_text, held_out_rows
from lora_cli.intervals import Figure, ratio
from lora_cli.memory import tokens_worth_it
from lora_cli.model import LanguageModel
from lora_cli.questions import Question, answer, choose, expected_texts, options_of, questions_of, units_of
from lora_cli.records import Forgetting, as_json
from lora_cli.redact import redact
from lora_cli.reports import Comparison, EvalReport, Sample
from lora_cli.scan import scan
from lora_cli.tuned import AnyResult

LABEL: Literal["label"] = "label"
METRICS = (*scoring.METRICS, LABEL)


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for. Answers are greedy at temperature 0; `extract` is as `scoring.find` has it."""

    data: str | None = None
    base: str | None = None
    answers: int = 200
    metrics: Sequence[str] = ("exact-match",)
    extract: str | None = None
    sampling: Sampling = GREEDY
    max_new_tokens: int | None = None  # null: a little more than the longest expected answer
    general: str | None = None  # null: what the run measured forgetting on
    tasks: Sequence[str] = ()
    limit: int | None = None  # documents of each task
    scan: bool = False


def compare(path: Path, asked: Asked) -> EvalReport:
    """Measure base and adapter on the asked rows, else on the run's own test or validation rows.

    Loss, perplexity and token accuracy are over every target, other figures over at most `answers` rows, spread evenly.
    The report, and both models' answers, are kept in the run's folder, where it belongs to one. Several processes
    share the work, and all get the report that one alone would.
    """
    if unknown := [name for name in asked.metrics if name not in METRICS]:
        raise InputError(f"--metric: there is no {unknown[0]}; known are {', '.join(METRICS)}.")
    scoring.require_pattern(asked.extract)
    result = tuned.find_any(path, asked.base)
    sharded = result.config is not None and result.config.train.shard
    with joined(result.base.device, sharded) as world:
        return _compare(result, asked, world)


def _compare(result: AnyResult, asked: Asked, world: World) -> EvalReport:
    if asked.tasks and world.size > 1:
        raise InputError("--tasks: lm-eval asks a model in one process; start without --nproc or torchrun.")
    with world.main_first():  # it keeps the tokens that the others then open
        held_out, rows, name = held_out_rows(result, asked.data)
        general = general_text(result, asked.general)
    weights = manifest.sha256(result.identity)
    world.require_same({"adapter": weights, "base model": result.base_fingerprint, "data": held_out.fingerprint()})
    if asked.scan and not general:
        raise InputError("--scan: needs general text, and the run measures none (eval.general: false); give --general.")
    options = options_of(held_out) if LABEL in asked.metrics else []
    loaded = tuned.load(result, world.device, sharded=world if world.in_step else None)
    tokens = tokens_worth_it(loaded.device)

    base, adapted = measure(loaded, held_out, tokens, BASE_AND_ADAPTER, world)
    losses = base.per_target("loss"), adapted.per_target("loss")
    figures = {
        "loss": intervals.compare(*losses, lower_is_better=True),
        "perplexity": intervals.compare(*losses, _perplexity, lower_is_better=True),
        "token_accuracy": intervals.compare(base.per_target("correct"), adapted.per_target("correct")),
    }
    questions = questions_of(held_out, asked.answers)
    samples, more = _answered(loaded, result, questions, asked, world)
    figures |= more
    if options:
        hits = choose(loaded, questions, options, tokens, BASE_AND_ADAPTER, world)
        figures["label_accuracy"] = _compared([scoring.over_ones(each) for each in hits], units_of(questions))
    report = EvalReport(
        adapter=result.folder,
        data=name,
        rows=rows,
        targets=int(base.targets.sum()),
        answers=len(questions),
        figures=figures,
        forgetting=_forgetting(loaded, general, tokens, adapted, world) if general else None,
        tasks=_on_tasks(loaded, result, asked),
        scan=scan(loaded, held_out, general, tokens, _budget(result), world) if asked.scan else None,
        samples=samples,
        saved=None,
    )
    return _saved(report, result) if world.is_main else report


def _forgetting(
    loaded: LanguageModel, general: Sequence[Example], tokens: int, adapted: Measured, world: World
) -> Forgetting:
    base_general, tuned_general = measure(loaded, general, tokens, BASE_AND_ADAPTER, world)
    return forgetting(base_general, tuned_general, adapted)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    values: np.ndarray = np.exp(np.minimum(ratio(sums), 700.0))
    return values


def _budget(result: AnyResult) -> float | None:
    return result.config.eval.forgetting_budget if result.config else None


# --- answers ---


def _answered(
    loaded: LanguageModel, result: AnyResult, questions: Sequence[Question], asked: Asked, world: World
) -> tuple[list[Sample], dict[str, Comparison]]:
    """Return both models' answers side by side, and what the metrics say of them."""
    metrics = [metric for metric in scoring.METRICS if metric in asked.metrics]
    tokenizer = result.header.tokenizer
    expected = expected_texts(loaded, tokenizer, questions)
    scoring.require_found(expected, [each.where for each in questions], asked.extract)
    said = []
    for gain in BASE_AND_ADAPTER if metrics else ():
        with tuning.gain(loaded.module, gain):
            limits = result.header.max_positions, asked.sampling, asked.max_new_tokens
            said.append(answer(loaded, tokenizer, questions, *limits, world))
    units, figures = units_of(questions), {}
    for metric in metrics:
        of_base, of_tuned = (scoring.score(metric, expected, answers, asked.extract) for answers in said)
        for base, adapted in zip(of_base, of_tuned, strict=True):
            figures[base.name] = _compared([base.sums, adapted.sums], units, base.figure)
    samples = [
        Sample(each.where, *map(redact, (tokenizer.decode(each.prompt), wanted, *answers)))
        for each, wanted, *answers in zip(questions, expected, *said, strict=True)
        if said
    ]
    return samples, figures


def _compared(tables: Sequence[np.ndarray], units: np.ndarray, figure: Figure = ratio) -> Comparison:
    """Compare the sums of base and adapter [questions, K], added up by unit."""
    added = []
    for table in tables:
        by_unit = np.zeros((int(units.max(initial=-1)) + 1, table.shape[1]))
        np.add.at(by_unit, units, table)
        added.append(by_unit)
    return intervals.compare(added[0], added[1], figure)


def _on_tasks(loaded: LanguageModel, result: AnyResult, asked: Asked) -> dict[str, Comparison]:
    if not asked.tasks:
        return {}
    from lora_cli.harness import run_tasks

    return run_tasks(loaded, result.header.tokenizer, asked.tasks, asked.limit)


# --- what is kept ---


def _saved(report: EvalReport, result: AnyResult) -> EvalReport:
    """Write a report and all its samples into the folder of its run; elsewhere nothing is written."""
    if result.run is None:
        return report
    name = f"{report.adapter.name}-{Path(report.data).stem.replace(' ', '-')}"
    path = result.run.evaluations / f"{name}.json"
    with storage.explained(path):
        storage.make_folder(path.parent)
    report = replace(report, saved=path)
    values = as_json(report)
    samples = values.pop("samples")
    storage.write_json(path, values)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    storage.write_file(path.with_suffix(".samples.jsonl"), lines)
    return report
