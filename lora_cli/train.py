"""`lora train`: a run from its config to its adapter, written down as it goes."""

import contextlib
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from lora_cli import data, interrupt, launch, resume, room, run_dir
from lora_cli.config import RunConfig
from lora_cli.interrupt import StopRequest
from lora_cli.records import Event, Finished, Notice
from lora_cli.resume import Change
from lora_cli.run_dir import RunDir

if TYPE_CHECKING:  # torch is imported only once config and rows are good
    from lora_cli.distributed import World
    from lora_cli.prepare import Prepared


def ended(config: RunConfig, override: bool = False) -> Finished | None:
    """Return how a run of this config ended, when it is finished; raises when the folder cannot be used."""
    run = run_dir.of(config)
    changed = resume.is_changed(resume.plan(run, config, override))
    return None if changed else run_dir.read_finished(run)


def train(
    config: RunConfig, stop: StopRequest, override: bool = False, origins: Mapping[str, str] | None = None
) -> Generator[Event, None, None]:
    """Train, or continue an interrupted run of the same config; yield what happens and write it down.

    Started by torchrun, the processes share the work; all yield, the main one writes. With `override` the config may
    differ from the run's in how the rest is trained; `origins` are written down for who reads the run. Raises
    UserError: InputError and SurroundingsError before anything is written, TrainingStopped, Interrupted.
    """
    run, is_main = run_dir.of(config), launch.current().is_main
    resume.plan(run, config, override)
    with contextlib.ExitStack() as holding:
        is_held = is_main and run.path.is_dir()
        if is_held:
            _hold(run, holding)
        data.require_readable(config.data, config.eval.general_source)
        if is_main:
            room.require_writable(run.path, "output_dir")

        from lora_cli import notices
        from lora_cli.distributed import joined
        from lora_cli.prepare import prepare

        with joined(config.model.device, config.train.shard) as world:
            with world.main_first():  # it keeps the tokens that the others then open
                prepared = yield from prepare(config)
            interrupt.poll()
            for text in notices.of(prepared, config):
                yield Notice(text)
            if is_main and not is_held:  # another process may have made it by now
                _hold(run, holding)
            changes = resume.plan(run, config, override)
            yield from _train(config, run, prepared, stop, changes, world, origins or {})


def _hold(run: RunDir, holding: contextlib.ExitStack) -> None:
    """Hold a run's directory for as long as `holding` is open."""
    leave = holding.enter_context(run_dir.held(run))
    holding.enter_context(interrupt.leaving(leave))


def _train(
    config: RunConfig,
    run: RunDir,
    prepared: "Prepared",
    stop: StopRequest,
    changes: list[Change],
    world: "World",
    origins: Mapping[str, str],
) -> Iterator[Event]:
    """Train in a directory that is held."""
    from lora_cli import environment
    from lora_cli.probe import choose_rate
    from lora_cli.session import open_session, untrained_ends

    here = environment.describe(config, run, prepared, changes, world)
    resume.require_same(run, here)
    if others := resume.other_versions(run, here):
        yield Notice(
            "The numbers of a run are equal to the bit only where everything is that they come from; these differ from "
            f"the run's start: {', '.join(f'{one.key} {one.before} -> {one.after}' for one in others)}."
        )
    if world.is_main:
        _require_room(config, run, prepared)
    session = open_session(config, prepared, here, stop, world, origins)
    for text in untrained_ends(session):
        yield Notice(text)
    rate = (yield from choose_rate(session, config, run)) if config.train.learning_rate == "auto" else None
    yield from session.run(config, run, [*changes, *others], rate)


def _require_room(config: RunConfig, run: RunDir, prepared: "Prepared") -> None:
    """Raise SurroundingsError where the disk has not the room for what the run will still write."""
    from lora_cli import checkpoint

    one = checkpoint.size(prepared.trained_parameters(config.lora), config.lora)
    most = (config.save.keep + 2) * one + one // 3  # those kept, the best, the one being written; the adapter
    room.require_room(run.path, max(one, most - room.size_of(run.path)))
