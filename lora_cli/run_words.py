"""A run in sentences, and the commands that follow from how it stands."""

import shlex
from collections.abc import Iterator

from lora_cli.config import RunConfig
from lora_cli.records import Forgetting, Tested, perplexity, with_interval
from lora_cli.reports import ScanReport
from lora_cli.run_reports import RunReport

_PERCENT = ("token_accuracy", "exact_match", "label_accuracy", "json_valid", "json_fields", "rouge_l", "bleu", "chrf")
_METHODS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "full": "full fine-tuning"}


def summary(run: RunReport, config: RunConfig) -> list[str]:
    """Return what a run is, how it stands, what it gained and what it forgot."""
    return [_what(run, config), _state(run), *_gain(run), *_test(run), *_forgetting(run, config), *_answers(run)]


def _what(run: RunReport, config: RunConfig) -> str:
    method = _METHODS[config.lora.method]
    rank = "" if config.lora.method == "full" else f", rank {config.lora.rank}"
    share = ""
    if run.trainable_parameters and run.total_parameters:
        share = f" ({run.trainable_parameters:,} of {run.total_parameters:,} parameters)"
    train, named = run.data.get("train"), ", ".join(source.path for source in config.data.sources)
    rows = f"{train.examples:,} examples with {train.targets:,} trained tokens from " if train else ""
    return f"{config.model.path} was tuned by {method}{rank}{share} on {rows}{named}."


def _state(run: RunReport) -> str:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    reason = f": {run.reason}" if run.reason else ""
    match run.status:
        case "finished":
            return f"It is finished after {run.step:,}{of} steps{reason}."
        case "running":
            return f"It is at step {run.step:,}{of}, or was killed there; this page shows it as it was read."
        case "stopped" | "failed":
            return f"It {'was stopped' if run.status == 'stopped' else 'failed'} after {run.step:,}{of} steps{reason}."
    return "It has not begun to train."


def _gain(run: RunReport) -> Iterator[str]:
    base, best = run.base, run.best
    if base is None:
        yield "Without validation rows it is not known what it gained; the last adapter is kept."
        return
    if best is None:
        yield f"The base model's validation loss is {base.loss:.4f}; nothing that was trained is measured yet."
        return
    kept = "is kept" if run.status == "finished" else "is the best so far"
    yield (
        f"Validation loss went from {base.loss:.4f} (base) to {best.loss:.4f}, perplexity from "
        f"{perplexity(base.loss):,.2f} to {perplexity(best.loss):,.2f}; that of step {best.step:,} {kept}."
    )
    if best.loss >= base.loss:
        yield "No evaluation was better than the base model: on the validation rows this does not help."


def _test(run: RunReport) -> Iterator[str]:
    test: Tested | None = run.finished.test if run.finished else None
    if test is not None:
        flattery = f"; validation was flattered by {with_interval(test.flattery, '+.4f')}"
        yield (
            f"On the test rows, which chose nothing, the loss went from {test.base_loss:.4f} to {test.loss:.4f}: "
            f"{with_interval(test.change, '+.4f')}{flattery if test.flattery.value is not None else ''}."
        )


def _forgetting(run: RunReport, config: RunConfig) -> Iterator[str]:
    found = run.best.forgetting if run.best else None
    if found is None or found.rise.value is None:
        return
    budget, rise = config.eval.forgetting_budget, with_interval(found.rise, "+.4f")
    against = "; no budget was set (eval.forgetting_budget)"
    if budget is not None:
        against = f", {'within' if found.rise.value <= budget else 'over'} the budget of {budget:g}"
    yield f"Its loss on general text went from {found.base_loss:.4f} by {rise} nats a token{against}."


def _answers(run: RunReport) -> Iterator[str]:
    for evaluation in run.evaluations[:1]:
        verdicts = [
            f"{name.replace('_', ' ')} {with_interval(both.difference, f'+{spec_of(name)}')} ({both.verdict})"
            for name, both in {**evaluation.figures, **evaluation.tasks}.items()
            if both.verdict is not None and name != "perplexity"
        ]
        said = "; ".join(verdicts) or "too few rows to tell them apart"
        yield f"Measured on {evaluation.data}, {evaluation.rows:,} rows, against the base: {said}."


def commands(run: RunReport, config: RunConfig) -> list[str]:
    """Return the commands that follow from how a run stands."""
    place = shlex.quote(str(run.path))
    if run.status != "finished":
        goes_on = f"lora train {shlex.quote(str(run.path / 'config.yaml'))}"
        return [goes_on, f"lora report {place}"]
    is_adapter, found = config.lora.method != "full", list[str]()
    if config.data.validation or config.data.test:
        measured = any(each.figures for each in run.evaluations)
        scanned = any(each.scan for each in run.evaluations) or config.eval.general is False
        found += [] if measured and scanned else [f"lora eval {place}{'' if scanned else ' --scan'}"]
    budget = config.eval.forgetting_budget
    if is_adapter and run.finished and run.finished.within_budget is False and budget is not None:
        found.append(f"lora scale {place} --budget {budget:g} --output {shlex.quote(f'{run.path}-scaled')}")
    found.append(f"lora chat {place}")
    if is_adapter:
        found.append(f"lora merge {place} --output {shlex.quote(f'{run.path}-merged')}")
    return found


# --- what was measured ---


def spec_of(figure: str) -> str:
    """Return how the numbers of a figure of `lora eval` are written."""
    return ".1%" if figure in _PERCENT else ",.2f" if figure == "perplexity" else ".4f"


def forgetting_in_words(found: Forgetting) -> str:
    """Return the rise on general text and the KL to the base in one sentence."""
    return (
        f"loss on general text {found.base_loss:.4f} (base) {with_interval(found.rise, '+.4f')} on {found.tokens:,} "
        f"tokens; KL to the base {with_interval(found.kl, '.4f')} on {found.kl_tokens:,} targets"
    )


def scan_marks(report: ScanReport) -> dict[float, str]:
    """Return what is special about some gains."""
    marks = {report.best: "lowest loss"}
    marks[report.knee] = f"{marks[report.knee]}, knee" if report.knee in marks else "knee"
    if report.best_within is not None:
        what = f"best within {report.budget:g}"
        marks[report.best_within] = f"{marks.get(report.best_within, '')}, {what}".removeprefix(", ")
    return marks
