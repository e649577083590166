"""The commands that read a config: init, check, train, tune. What is slow to import is imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli import (
    config_file,
    console,
    follower,
    interrupt,
    key_lists,
    launch,
    metrics,
    origins,
    outlook,
    run_dir,
    summary,
    tracking,
    trial_tables,
)
from lora_cli.arguments import Config, Json, Overrides, Processes, Quiet, Restarts
from lora_cli.errors import InputError
from lora_cli.init_report import RecipeList
from lora_cli.records import Finished, as_json
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport
from lora_cli.standing import SearchStanding


def init(
    path: Annotated[Path, typer.Argument(help="The config to write.")] = Path("train.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id or folder.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="The training data.", show_default=False)] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where the run will be written.", show_default=False)] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Write this recipe; list names them.", show_default=False)
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Name the recipes and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; also so without a terminal.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the config's JSON Schema and write nothing.")] = False,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="A config of Axolotl or LLaMA-Factory, to be converted.", show_default=False),
    ] = None,
    from_processes: Annotated[int, typer.Option(min=1, help="With --from: the processes that config was run on.")] = 1,
    json: Json = False,
) -> None:
    """Write a config that suits your rows, your model and this machine."""
    if schema:
        console.print_json(config_file.json_schema())
        return
    from lora_cli import decision_table, interview
    from lora_cli import init as starting
    from lora_cli import recipe as recipes

    if list_recipes or recipe == "list":
        listed = RecipeList(recipes.names())
        console.print_json(as_json(listed)) if json else decision_table.show_recipes(listed)
        return
    starting.require_new(path)
    if from_ is not None:
        _convert(path, from_, from_processes, (model, data, output_dir, recipe), json)
        return
    if from_processes != 1:
        raise InputError("--from-processes: has no effect without --from.")
    wishes = interview.Wishes(model, data, output_dir)
    if recipe is not None:
        report = starting.init_from_recipe(path, recipe, wishes.given())
    else:
        asks = not (yes or json) and console.is_interactive() and (model is None or data is None)
        wishes = interview.ask(wishes) if asks else wishes.filled_in()
        report = follower.follow_preparation(starting.init(path, wishes.given(), wishes.keep))
    if json:
        console.print_json(as_json(report))
    else:
        decision_table.show(report)


def _convert(path: Path, from_: Path, processes: int, others: tuple[str | None, ...], json: bool) -> None:
    """Write another program's config as ours."""
    if any(other is not None for other in others):
        raise InputError("--from: takes model, data and output_dir from that config; leave the options for them out.")
    from lora_cli import convert

    report = convert.convert(from_, path, processes)
    if json:
        console.print_json(as_json(report))
    else:
        key_lists.show(report)


def check(
    config: Config,
    overrides: Overrides = None,
    row: Annotated[
        str | None, typer.Option(help="Show this row, by its number or as file:number.", show_default=False)
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="The memory of each of so many processes.")] = 1,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Show what a run would do: rows, targets, memory. Trains nothing."""
    run_config = config_file.load(config, overrides or [])
    from lora_cli import data as rows

    rows.require_readable(run_config.data, run_config.eval.general_source)
    from lora_cli import check as checking

    report = follower.follow_preparation(checking.check(run_config, row, nproc), quiet)
    if json:
        console.print_json(as_json(report))
    else:
        outlook.show_check(report, whole=row is not None)
        console.show_next((["lora", "train", config, *(overrides or [])], "train it"))


def train(
    config: Config,
    overrides: Overrides = None,
    override: Annotated[
        bool, typer.Option("--override", help="Go on with a run although its rest is to be trained in another way.")
    ] = False,
    nproc: Processes = 1,
    restarts: Restarts = 0,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train; an interrupted run of the same config is continued."""
    run_config = config_file.load(config, overrides or [])
    is_main, is_to_start = launch.current().is_main, launch.is_to_start(nproc, restarts)
    from lora_cli import train as training

    ended = training.ended(run_config, override)
    already = ended is not None
    if ended is None and is_main:
        tracking.require(run_config)
    if ended is None and is_to_start:
        from lora_cli import data, launcher

        data.require_readable(run_config.data, run_config.eval.general_source)
        launcher.launch(nproc, restarts)
    if ended is None:
        where = origins.of(run_config, config, overrides or [])
        events = training.train(run_config, interrupt.requested(), override, where)
        tracked = tracking.tracked(events, run_config)
        last = follower.Follower(silent=not is_main, quiet=quiet).follow(tracked)
        assert isinstance(last, Finished), "the loop ends with Finished or raises"
        ended = last
    if not is_main:
        return
    if json:
        console.print_json(as_json(ended))
    else:
        measured = metrics.read_measured(run_dir.of(run_config))
        summary.show_finished(ended, run_config.output_dir, measured, already)


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
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Search hyperparameters; an interrupted search is continued.

    Several processes share one search: start the command as often as there are processors or machines.
    """
    given = {"tune.trials": trials, "tune.storage": storage_place}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    run_config = config_file.load(config, [*(overrides or []), *more])
    if one_at_a_time and against_full:
        raise InputError("--one-at-a-time, --against-full: give one of them.")
    where = origins.of(run_config, config, [*(overrides or []), *more])
    search = SearchStanding(None if one_at_a_time else run_config.tune.trials)
    stop, follow = interrupt.requested(), follower.Follower(quiet=quiet, search=search).result_of
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
