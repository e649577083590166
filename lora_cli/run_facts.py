"""Run and search directories -> what a report shows of them; read as they are, in whatever state."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lora_cli import config_file, curves, json_file, metrics, run_dir, run_words, search_dir
from lora_cli.config import Range, RunConfig
from lora_cli.errors import AdapterError, UserError
from lora_cli.json_file import is_number
from lora_cli.records import DataCounts, Evaluated, Probed, Start
from lora_cli.reports import EvalReport, Sample
from lora_cli.run_dir import RunDir
from lora_cli.run_reports import RunReport, SearchReport, Setting
from lora_cli.schema import defaults, flat
from lora_cli.search_dir import SearchDir
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport
from lora_cli.strict_yaml import dump_inline

_SAMPLES = 12  # answers of an evaluation that a page shows
Found = TypeVar("Found")


def read_run(run: RunDir) -> RunReport:
    """Return what is known of a run. Raises UserError where its config cannot be read, or it leads out of its folder.

    What else cannot be read is left out, and named in `warnings`.
    """
    run_dir.require_own(run)
    config, warnings = config_file.load(run.config), list[str]()

    def known(read: Callable[[], Found], otherwise: Found) -> Found:
        try:
            return read()
        except UserError as error:
            warnings.extend(error.problems)
            return otherwise

    status = known(lambda: run_dir.read_status(run), dict[str, Any]())
    start = known(lambda: run_dir.read_start(run), None)
    records = known(lambda: metrics.read(run), list[dict[str, Any]]())
    evaluated = known(lambda: metrics.read_evaluated(run), dict[int, Evaluated]())
    probe = known(lambda: run_dir.read_facts(run.probe), dict[str, Any]())
    steps = [one for one in records if one["event"] == "step"]
    found = RunReport(
        name=str(run.path),
        path=run.path,
        status=str(status.get("status") or "not begun"),
        reason=str(status["reason"]) if status.get("reason") else None,
        step=max((one["step"] for one in records), default=0),
        total_steps=start.total_steps if start else config.train.max_steps,
        tokens=sum(_whole(one.get("tokens")) for one in steps),
        seconds=sum(float(one["seconds"]) for one in records if is_number(one.get("seconds"))),
        trainable_parameters=start.trainable_parameters if start else None,
        total_parameters=start.total_parameters if start else None,
        summary=[],
        next=[],
        notices=start.notices if start else [],
        warnings=warnings,
        base=evaluated.get(0),
        best=_best(evaluated),
        budget=config.eval.forgetting_budget,
        max_grad_norm=config.train.max_grad_norm,
        finished=known(lambda: run_dir.read_finished(run), None),
        curves=curves.of(records),
        settings=list(_settings(config, start)),
        changes=_objects(status.get("changes")),
        data=_counts(start),
        evaluations=[
            one for path in _newest(run.evaluations) if (one := known(partial(_evaluation, path), None)) is not None
        ],
        tried_rates=known(
            lambda: [json_file.checked(Probed, one, run.probe) for one in _objects(probe.get("tried"))], []
        ),
        chosen_rate=float(probe["chosen"]) if is_number(probe.get("chosen")) else None,
        environment=known(lambda: run_dir.read_environment(run), dict[str, Any]()),
    )
    return replace(found, summary=run_words.summary(found, config), next=run_words.commands(found, config))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _best(evaluated: Mapping[int, Evaluated]) -> Evaluated | None:
    """Return the evaluation whose adapter is the best so far."""
    best = max(evaluated.values(), key=lambda one: one.step).best_step if evaluated else None
    return evaluated.get(best) if best is not None else None


def _settings(config: RunConfig, start: Start | None) -> Iterator[Setting]:
    known, origins = dict(defaults(RunConfig)), start.origins if start else {}
    plain = json.loads(config.model_dump_json())
    for key, value in flat(config):
        written: Any = plain
        for part in key.split("."):
            written = written[part]
        yield Setting(key, dump_inline(written), key in known and value == known[key], origins.get(key))


def _counts(start: Start | None) -> Mapping[str, DataCounts]:
    return start.data if start else {}


def _newest(evaluations: Path) -> list[Path]:
    """Return the files of what `lora eval` found, the newest first."""
    return sorted(evaluations.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)


def _evaluation(path: Path) -> EvalReport | None:
    values = json_file.read_object(path)
    return json_file.checked(EvalReport, values | {"samples": list(_samples(path)), "saved": path}, path)


def _samples(path: Path) -> Iterator[Mapping[str, Any]]:
    """Iterate over the first answers beside an evaluation, as far as they can be read."""
    names = [field.name for field in fields(Sample)]
    with contextlib.suppress(OSError, ValueError), path.with_suffix(".samples.jsonl").open(encoding="utf-8") as lines:
        for _, text in zip(range(_SAMPLES), lines, strict=False):
            values = json.loads(text)
            if isinstance(values, Mapping):
                yield {name: str(values.get(name, "")) for name in names}


# --- searches ---


def is_search_dir(path: Path) -> bool:
    """Return whether a folder is that of a search."""
    inside = (path / "trials", path / "lora", SearchDir(path).report)
    return (path / "config.yaml").is_file() and not run_dir.is_run_dir(path) and any(map(Path.exists, inside))


def searches_of(path: Path) -> list[SearchReport]:
    """Return the search that a folder holds, or those beside a run. Raises UserError where one cannot be read."""
    places = [path.with_name(f"{path.name}-{kind}") for kind in search_dir.KINDS]
    here = [SearchDir(place) for place in (path, *places) if SearchDir(place).report.is_file()]
    return [read_search(place) for place in here]


def read_search(place: SearchDir) -> SearchReport:
    """Return what a search came to. Raises UserError."""
    run_dir.require_own(place.as_run)
    config, values = config_file.load(place.config), json_file.read_object(place.report)
    space = config.tune.space or {"train.learning_rate": Range(low=1e-6, high=1, log=True)}

    def read(record: type[Found], mark: str) -> Found | None:
        return json_file.checked(record, values, place.report) if mark in values else None

    sensitivity = read(SensitivityReport, "knobs")
    if sensitivity is not None and any(len(knob.values) != len(knob.changes) for knob in sensitivity.knobs):
        raise AdapterError(f"{place.report}: a knob has not as many changes as values; put the file back as it was.")
    return SearchReport(
        name=str(place.path),
        path=place.path,
        logarithmic=[key for key, wanted in space.items() if isinstance(wanted, Range) and wanted.log],
        tune=read(TuneReport, "trials"),
        sensitivity=sensitivity,
        against_full=read(AgainstFullReport, "full"),
    )


def runs_of_search(place: SearchDir) -> list[RunDir]:
    """Return the runs of a search that a report shows whole: the best, or both sides."""
    trained = [place.best, *(RunDir(place.path / side) for side in ("lora", "full"))]
    return [run for run in trained if run_dir.is_run_dir(run.path)]
