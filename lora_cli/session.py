"""One base in memory and the tokens it is trained on, for one run or for many, each with an adapter of its own."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_cli import (
    adapter,
    adapter_folder,
    ends,
    interrupt,
    metrics,
    model,
    notices,
    origins,
    resume,
    run_dir,
    storage,
    tuning,
)
from lora_cli.config import ModelConfig, RunConfig
from lora_cli.distributed import World, memory_error
from lora_cli.errors import Interrupted, UserError
from lora_cli.forgetting import Validation
from lora_cli.interrupt import StopRequest
from lora_cli.loop import Loop
from lora_cli.model import LanguageModel
from lora_cli.prepare import Prepared
from lora_cli.records import Evaluated, Event, Finished, Notice, Start, Started, StepDone, as_json
from lora_cli.resume import Change
from lora_cli.run_dir import RunDir
from lora_cli.schema import flat, value_of
from lora_cli.timetable import Timetable


@dataclass(frozen=True)
class Session:
    """What runs on one base share."""

    prepared: Prepared
    model: LanguageModel
    validation: Validation | None
    base: ModelConfig
    environment: Mapping[str, Any]
    stop: StopRequest
    world: World
    config: RunConfig  # the one that was asked for; trials change it
    origins: Mapping[str, str]  # of its values

    def total_steps(self, config: RunConfig) -> int:
        """Return how many steps a run of the config takes."""
        return Timetable.of(self.prepared.train.mixture.drawn, config).total_steps

    def run(
        self, config: RunConfig, run: RunDir, changes: Sequence[Change] = (), rate: float | None = None
    ) -> Iterator[Event]:
        """Train in a directory that is held, from where it stands; yield what happens and write it down.

        `changes` are what differs from how the run was begun, `rate` is the learning rate where the config has none.
        The config may differ from that of other runs of the session in how the adapter is made and trained, not in base
        and data.
        """
        with interrupt.patience():
            if self.world.is_main:
                resume.create(run, config, self.environment)
                resume.write_start(run, self._start(config), changes)
                if (warning := run_dir.warning(run)) is not None:
                    yield Notice(warning)
            self.world.from_main()
            loop = self._loop(config if rate is None else with_rate(config, rate), run)
            for foreign in run_dir.foreign_folders(run) if self.world.is_main else ():
                yield Notice(f"{foreign}: is no checkpoint of this program, and is passed over.")
            yield from loop.restore()
            self.world.require_same({"step": str(loop.state.step)})
            if any(change.key == "eval.forgetting_budget" for change in changes):
                loop.state.stopping.judge_anew(config.eval.forgetting_budget)
            if self.world.is_main:
                best_step = loop.state.stopping.best_step or loop.state.step
                for text in resume.write_down(run, config, changes, loop.state.step, best_step):
                    yield Notice(text)
            yield self._started(loop)
            yield from _written_down(loop, run, self.world)

    def _start(self, config: RunConfig) -> Start:
        """Return what is known of a run before its first step."""
        prepared = self.prepared
        counts = {
            "train": prepared.train_counts,
            "validation": prepared.validation_counts,
            "test": prepared.test_counts if prepared.test is not None else None,
            "replay": prepared.replay_counts,
        }
        own = {key for key, value in flat(config) if value != value_of(self.config, key)}
        return Start(
            total_steps=self.total_steps(config),
            trainable_parameters=prepared.trained_parameters(config.lora),
            total_parameters=prepared.total_parameters(config.lora),
            data={name: count for name, count in counts.items() if count is not None},
            notices=[*notices.of(prepared, config), *untrained_ends(self)],
            origins={key: origins.SEARCH if key in own else origin for key, origin in self.origins.items()},
            system=prepared.system,
        )

    def _loop(self, config: RunConfig, run: RunDir) -> Loop:
        prepared = self.prepared
        templates = prepared.template.files(*adapter.TEMPLATES) if prepared.template and prepared.templated else {}
        fingerprint = str(self.environment["base_fingerprint"])
        base = prepared.header.folder
        origin = adapter_folder.Origin(self.base.path, self.base.revision, fingerprint, templates, base)
        tokens = int(self.environment["micro_batch_tokens"])
        return Loop(
            config,
            run,
            self.model,
            prepared.train,
            self.validation,
            prepared.test,
            origin,
            self.stop,
            tokens,
            self.world,
        )

    def _started(self, loop: Loop) -> Started:
        trainable = sum(p.numel() for p in tuning.trainable(self.model.module).values())
        return Started(
            step=loop.state.step,
            total_steps=loop.timetable.total_steps,
            steps_per_epoch=loop.timetable.steps_per_epoch,
            train=self.prepared.train_counts,
            validation=self.prepared.validation_counts,
            trainable_parameters=trainable,
            total_parameters=self.prepared.total_parameters(loop.config.lora),
            forward=", ".join(filter(None, (str(self.model.layout), str(loop.lanes)))),
            patience=loop.config.train.early_stopping.patience,
            forgetting_budget=loop.config.eval.forgetting_budget,
            before=metrics.read_measured(loop.run) if self.world.is_main else (),
        )


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    """Return a config with a learning rate in the place of its own."""
    return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})})


def as_trial(config: RunConfig, place: RunDir, steps: int) -> RunConfig:
    """Return the config of a trial of a run: so many steps, and test rows are for what is chosen in the end."""
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"max_steps": steps}),
            "data": config.data.model_copy(update={"test": None}),
            "output_dir": str(place.path),
        }
    )


def for_trials(session: Session, forgetting: bool = False) -> Session:
    """Return a session that measures validation only, without test rows, and forgetting where it is asked for."""
    assert session.validation is not None, "config_checks asks for it"
    validation = session.validation if forgetting else session.validation.without_general()
    return replace(session, validation=validation, prepared=replace(session.prepared, test=None))


def open_session(
    config: RunConfig,
    prepared: Prepared,
    environment: Mapping[str, Any],
    stop: StopRequest,
    world: World,
    where: Mapping[str, str] | None = None,
) -> Session:
    """Load the base that a config names; `where` says where its values come from."""
    loaded = model.load_model(prepared.header, config.model, world.device, world if world.in_step else None)
    validation = None
    if prepared.validation is not None:
        validation = Validation(loaded, prepared.validation, prepared.general, world)
    return Session(prepared, loaded, validation, config.model, environment, stop, world, config, where or {})


def untrained_ends(session: Session) -> Iterator[str]:
    """Iterate over what to tell the user of tokens that answers end with, and that the base was never trained on."""
    for end in sorted(session.prepared.ends):
        if problem := ends.untrained_end(session.model, session.prepared.header.tokenizer, end):
            yield problem


def _written_down(loop: Loop, run: RunDir, world: World) -> Iterator[Event]:
    """Pass a loop's events on; on the main process write the run's measurements and its state."""
    if world.is_main:
        run_dir.write_status(run, "running", step=loop.state.step, pid=os.getpid())
    finished = False
    try:
        with storage.appending(run.metrics) if world.is_main else contextlib.nullcontext() as measured:
            for event in loop:
                if isinstance(event, StepDone | Evaluated) and measured is not None:
                    metrics.append(measured, event)
                if isinstance(event, Finished) and world.is_main:
                    facts = {key: value for key, value in as_json(event).items() if key != "adapter"}
                    run_dir.write_status(run, "finished", **facts)
                    finished = True
                yield event
    except BaseException as caught:
        error = memory_error(caught) or caught
        if not finished and world.is_main:
            state = "stopped" if isinstance(error, Interrupted | GeneratorExit | KeyboardInterrupt) else "failed"
            reason = error.problems[0] if isinstance(error, UserError) else type(error).__name__
            progress = asdict(loop.state.stopping)
            with contextlib.suppress(UserError):  # on a full disk, what is said is why the run stopped
                run_dir.write_status(run, state, step=loop.state.step, reason=reason, **progress)
        if error is caught:
            raise
        raise error from caught
