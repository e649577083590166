"""The commands that read a config: init, check, train, tune. What is slow to import is imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli import (
    config_file,
    console,
    follower,
    interrupt,
    launch,
    origins,
    outlook,
    storage,
    trial_tables,
)
from lora_cli.arguments import Config, Json, Overrides, Processes, Restarts
from lora_cli.errors import ConfigError, InputError
from lora_cli.records import Finished, as_json
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport


def init(
    path: Annotated[Path, typer.Argument(help="The config to write.")] = Path("train.yaml"),
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    data: Annotated[str, typer.Option(help="The training data.")] = "train.jsonl",
    output_dir: Annotated[str, typer.Option(help="Where the run will be written.")] = "runs/first",
    schema: Annotated[bool, typer.Option("--schema", help="Print the config's JSON Schema and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Write a commented config to start from."""
    if schema:
        console.print_json(config_file.json_schema())
        return
    if path.exists():
        raise ConfigError(f"{path}: already exists; name another file, or delete it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist; make it first (mkdir -p {path.parent}).")
    storage.write_file(path, config_file.commented(model, data, output_dir))
    if json:
        console.print_json({"config": str(path)})
    else:
        console.print_text(f"Wrote {path}. Next: lora check {path}")


def check(
    config: Config,
    overrides: Overrides = None,
    row: Annotated[
        str | None, typer.Option(help="Show this row, by its number or as file:number.", show_default=False)
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="The memory of each of so many processes.")] = 1,
    json: Json = False,
) -> None:
    """Show what a run would do: data, mask preview, targets, memory. Trains nothing."""
    run_config = config_file.load(config, overrides or [])
    from lora_cli import data as rows

    rows.require_readable(run_config.data, run_config.eval.general_source)
    from lora_cli import check as checking

    report = follower.follow_preparation(checking.check(run_config, row, nproc))
    if json:
        console.print_json(as_json(report))
    else:
        outlook.show_check(report, whole=row is not None)


def train(
    config: Config,
    overrides: Overrides = None,
    override: Annotated[
        bool, typer.Option("--override", help="Go on with a run although its rest is to be trained in another way.")
    ] = False,
    nproc: Processes = 1,
    restarts: Restarts = 0,
    json: Json = False,
) -> None:
    """Train; an interrupted run of the same config is continued."""
    run_config = config_file.load(config, overrides or [])
    is_main, is_to_start = launch.current().is_main, launch.is_to_start(nproc, restarts)
    from lora_cli import train as training

    ended = training.ended(run_config, override)
    already = ended is not None
    if ended is None and is_to_start:
        from lora_cli import data, launcher

        data.require_readable(run_config.data, run_config.eval.general_source)
        launcher.launch(nproc, restarts)
    if ended is None:
        where = origins.of(run_config, config, overrides or [])
        events = training.train(run_config, interrupt.requested(), override, where)
        last = follower.Follower(silent=not is_main).follow(events)
        assert isinstance(last, Finished), "the loop ends with Finished or raises"
        ended = last
    if not is_main:
        return
    if json:
        console.print_json(as_json(ended))
    else:
        console.show_finished(ended, run_config.output_dir, already)


def tune(
    config: Config,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Runs that are tried; else tune.trials.", show_default=False)
    ] = None,
    storage_place: Annotated[
        str | None,
        typer.Option("--storage", help="A journal file or a database's URL; else tune.storage.", show_default=False),
    ] = None,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="No search: each knob halved and doubled around the config.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="With --one-at-a-time: runs that differ in the seed alone.")] = 4,
    against_full: Annotated[
        bool, typer.Option("--against-full", help="No search: this config beside full fine-tuning, both trained.")
    ] = False,
    json: Json = False,
) -> None:
    """Search hyperparameters; an interrupted search is continued, and several processes share one."""
    given = {"tune.trials": trials, "tune.storage": storage_place}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    run_config = config_file.load(config, [*(overrides or []), *more])
    if one_at_a_time and against_full:
        raise InputError("--one-at-a-time, --against-full: give one of them.")
    where = origins.of(run_config, config, [*(overrides or []), *more])
    stop, follow = interrupt.requested(), follower.Follower(brief=True).result_of
    report: TuneReport | SensitivityReport | AgainstFullReport
    if one_at_a_time:
        from lora_cli import sensitivity

        report = follow(sensitivity.one_at_a_time(run_config, stop, seeds, where))
    elif against_full:
        from lora_cli import against_full as comparing

        report = comparing.against_full(run_config, stop)
    else:
        from lora_cli import tune as tuning

        report = follow(tuning.tune(run_config, stop, origins=where))
    if json:
        console.print_json(as_json(report))
    else:
        trial_tables.show(report)
