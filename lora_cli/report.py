"""`lora report`: runs and the searches beside them on one page, and their measurements as one flat table."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_cli import metrics_table, run_facts, storage
from lora_cli.errors import AdapterError, InputError, UserError
from lora_cli.nearby import did_you_mean
from lora_cli.page import document
from lora_cli.run_dir import RunDir, is_run_dir
from lora_cli.run_reports import Difference, Report, RunReport, SearchReport
from lora_cli.search_dir import SearchDir

FILE = "report.html"
_OWN = ("output_dir",)  # keys in which runs differ always
_HEAD_BYTES = 2000  # of a file, in which it says that it is ours


def report(paths: Sequence[Path], output: Path | None = None, table: Path | None = None) -> Report:
    """Collect what is known of runs, write the page, and return what was collected.

    One run's page goes into its folder where no `output` is named. `table` is a file for the measurements. Raises
    UserError, and then nothing is written.
    """
    paths = [path if path.name not in ("", "..") else path.resolve() for path in paths]  # . and .. have no name
    runs, searches = _found(paths)
    alone = _folder_of(paths[0]) if len(paths) == 1 else Path()
    output = output or (alone / FILE)
    _require_folder("--output", output)
    _require_ours(output)
    if table is not None:
        _require_folder("--metrics", table)
        metrics_table.require_place(table)
    found = _named([run_facts.read_run(run) for run in runs])
    names = [run.name for run in found]
    whole = Report(
        runs=found,
        searches=searches,
        settings=list(_differences(found, _settings_of, _OWN)),
        surroundings=list(_differences(found, _surroundings_of, ())),
        output=output,
        metrics=table,
    )
    storage.write_file(output, document.html(whole).encode("utf-8", "backslashreplace"))
    if table is not None:
        metrics_table.write(table, list(zip(names, runs, strict=True)))
    return whole


# --- which runs ---


def _found(paths: Sequence[Path]) -> tuple[list[RunDir], list[SearchReport]]:
    """Return the runs and searches that paths name, each once. Raises InputError with all that name none."""
    problems, runs, searches = list[str](), list[RunDir](), list[SearchReport]()
    for path in paths:
        try:
            place = _folder_of(path)
            runs += [RunDir(place)] if is_run_dir(place) else run_facts.runs_of_search(SearchDir(place))
            searches += run_facts.searches_of(place)
        except UserError as error:
            problems += error.problems
    if not problems and not runs and not searches:
        problems.append(f"{paths[0]}: this search has not come to anything yet; `lora tune` goes on with it.")
    if problems:
        raise AdapterError(*problems)
    return list({run.path.resolve(): run for run in runs}.values()), searches


def _folder_of(path: Path) -> Path:
    """Return the run or search directory that RUN names: itself, or that of its checkpoint or adapter."""
    for place in (path, path.parent, path.parent.parent):
        if is_run_dir(place):
            return place
    if run_facts.is_search_dir(path):
        return path
    if (path / "adapter_config.json").is_file():
        raise AdapterError(
            f"{path}: is an adapter without its run, so nothing is known of how it was trained; a report is of a run "
            f"directory (with config.yaml and metrics.jsonl). `lora eval {path} --data FILE` measures any adapter."
        )
    what = "is neither a run directory nor that of a search" if path.exists() else "does not exist"
    hint = did_you_mean(path, is_run_dir) or " Name the output_dir of a run, or a checkpoint in it."
    raise AdapterError(f"{path}: {what}.{hint}")


def _require_folder(option: str, path: Path) -> None:
    """Raise InputError where a file is to be written into a folder that is not there."""
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist; make it first.")


def _require_ours(output: Path) -> None:
    """Raise InputError where a file is to be replaced that is no report."""
    if output.is_dir():
        raise InputError(f"--output: {output} is a folder; name a file in it, as {output / FILE}.")
    if not output.exists():
        return
    with output.open("rb") as file:
        is_ours = document.MARK.encode() in file.read(_HEAD_BYTES)
    if not is_ours:
        raise InputError(f"--output: {output} is there and was not written by lora report; name another file.")


def _named(runs: Sequence[RunReport]) -> list[RunReport]:
    """Return runs by the last part of their paths, or by their paths where that is not enough."""
    names = [run.path.resolve().name for run in runs]
    often = Counter(names)
    return [
        replace(run, name=name if often[name] == 1 else str(run.path)) for run, name in zip(runs, names, strict=True)
    ]


# --- what differs ---


def _settings_of(run: RunReport) -> Mapping[str, str]:
    return {one.key: one.value for one in run.settings}


def _surroundings_of(run: RunReport) -> Mapping[str, str]:
    return {key: str(value) for key, value in run.environment.items() if not isinstance(value, Mapping)}


def _differences(
    runs: Sequence[RunReport], read: Callable[[RunReport], Mapping[str, Any]], left_out: Sequence[str]
) -> Iterator[Difference]:
    """Iterate over the keys whose values are not the same in all runs."""
    tables = [read(run) for run in runs]
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [str(table.get(key, "-")) for table in tables]
        if len(set(values)) > 1 and key not in left_out:
            yield Difference(key, values)
