"""`lora train`: a run from its config to its adapter, written down as it goes."""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_cli import __version__, base_folder, data, interrupt, launch, metrics, resume, room, run_dir
from lora_cli.config import RunConfig, flat
from lora_cli.errors import Interrupted, UserError
from lora_cli.interrupt import StopRequest
from lora_cli.records import Evaluated, Event, Finished, Notice, Started, StepDone, as_json
from lora_cli.resume import Change
from lora_cli.run_dir import RunDir

if TYPE_CHECKING:  # torch is imported only once config and rows are good
    from lora_cli.distributed import World
    from lora_cli.loop import Loop
    from lora_cli.prepare import Prepared


def ended(config: RunConfig, override: bool = False) -> Finished | None:
    """Return how a run of this config ended, when it is finished; raises when the folder cannot be used."""
    run = run_dir.of(config)
    changed = resume.is_changed(resume.plan(run, config, override))
    return None if changed else run_dir.read_finished(run)


def train(config: RunConfig, stop: StopRequest, override: bool = False) -> Iterator[Event]:
    """Train, or continue an interrupted run of the same config; yield what happens and write it down.

    Started by torchrun, the processes share the work; all yield, the main one writes. With `override` the config may
    differ from the run's in how the rest is trained. Raises UserError: InputError and SurroundingsError before anything
    is written, TrainingStopped, Interrupted.
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

        from lora_cli.distributed import joined
        from lora_cli.prepare import prepare

        with joined(config.model.device, config.train.shard) as world:
            with world.main_first():  # it keeps the tokens that the others then open
                prepared = yield from prepare(config)
            interrupt.poll()
            for text in prepared.notices:
                yield Notice(text)
            if is_main and not is_held:  # another process may have made it by now
                _hold(run, holding)
            changes = resume.plan(run, config, override)
            yield from _train(config, run, prepared, stop, changes, world)


def _hold(run: RunDir, holding: contextlib.ExitStack) -> None:
    """Hold a run's directory for as long as `holding` is open."""
    leave = holding.enter_context(run_dir.held(run))
    holding.enter_context(interrupt.leaving(leave))


def _train(
    config: RunConfig, run: RunDir, prepared: "Prepared", stop: StopRequest, changes: list[Change], world: "World"
) -> Iterator[Event]:
    """Train in a directory that is held."""
    from lora_cli import adapter, adapter_folder, lora, model
    from lora_cli.forgetting import Validation
    from lora_cli.loop import Loop

    environment = _environment(config, run, prepared, changes, world)
    resume.require_same(run, environment)
    if others := resume.other_versions(run, environment):
        yield Notice(
            "The numbers of a run are equal to the bit only where everything is that they come from; these differ from "
            f"the run's start: {', '.join(f'{one.key} {one.before} -> {one.after}' for one in others)}."
        )
    if world.is_main:
        _require_room(config, run, prepared)
    sharded = world if world.in_step else None
    language_model = model.load_model(prepared.header, config.model, world.device, sharded)
    for end in sorted(prepared.ends):
        if problem := model.untrained_end(language_model, prepared.header.tokenizer, end):
            yield Notice(problem)
    with interrupt.patience():
        if world.is_main:
            resume.create(run, config, environment)
            if (warning := run_dir.warning(run)) is not None:
                yield Notice(warning)
        world.from_main()
        templates = prepared.template.files(*adapter.TEMPLATES) if prepared.template and prepared.templated else {}
        base_fingerprint = str(environment["base_fingerprint"])
        origin = adapter_folder.Origin(config.model.path, config.model.revision, base_fingerprint, templates)
        validation = None
        if prepared.validation is not None:
            validation = Validation(language_model, prepared.validation, prepared.general, world)
        tokens = int(environment["micro_batch_tokens"])
        loop = Loop(config, run, language_model, prepared.train, validation, prepared.test, origin, stop, tokens, world)
        for foreign in run_dir.foreign_folders(run) if world.is_main else ():
            yield Notice(f"{foreign}: is no checkpoint of this program, and is passed over.")
        yield from loop.restore()
        world.require_same({"step": str(loop.state.step)})
        if any(change.key == "eval.forgetting_budget" for change in changes):
            loop.state.stopping.judge_anew(config.eval.forgetting_budget)
        if world.is_main:
            best_step = loop.state.stopping.best_step or loop.state.step
            for text in resume.write_down(run, config, [*changes, *others], loop.state.step, best_step):
                yield Notice(text)
        trainable = sum(p.numel() for p in lora.trainable(language_model.module).values())
        yield Started(
            step=loop.state.step,
            total_steps=loop.timetable.total_steps,
            steps_per_epoch=loop.timetable.steps_per_epoch,
            train=prepared.train_counts,
            validation=prepared.validation_counts,
            trainable_parameters=trainable,
            total_parameters=trainable + sum(p.numel() for p in prepared.skeleton.parameters()),
            forward=str(language_model.layout),
        )
        yield from _written_down(loop, run, world)


def _written_down(loop: "Loop", run: RunDir, world: "World") -> Iterator[Event]:
    """Pass a loop's events on; on the main process write the run's measurements and its state."""
    from lora_cli.distributed import memory_error

    if world.is_main:
        run_dir.write_status(run, "running", step=loop.state.step, pid=os.getpid())
    finished = False
    try:
        for event in loop:
            if isinstance(event, StepDone | Evaluated) and world.is_main:
                metrics.append(run, event)
            if isinstance(event, Finished) and world.is_main:
                facts = {key: value for key, value in as_json(event).items() if key != "adapter"}
                run_dir.write_status(run, "finished", **facts)
                finished = True
            yield event
    except BaseException as caught:
        error = memory_error(caught) or caught
        if not finished and world.is_main:
            state = "stopped" if isinstance(error, Interrupted | GeneratorExit) else "failed"
            reason = error.problems[0] if isinstance(error, UserError) else type(error).__name__
            progress = asdict(loop.state.stopping)
            with contextlib.suppress(UserError):  # on a full disk, what is said is why the run stopped
                run_dir.write_status(run, state, step=loop.state.step, reason=reason, **progress)
        if error is caught:
            raise
        raise error from caught


def _environment(
    config: RunConfig, run: RunDir, prepared: "Prepared", changes: list[Change], world: "World"
) -> dict[str, Any]:
    """Return what environment.json says: the main process's, which agrees with the others on config, base and data."""
    from lora_cli import remote_code
    from lora_cli.memory import estimate_memory
    from lora_cli.quantised import bitsandbytes

    base_fingerprint, data_fingerprint = base_folder.fingerprint(prepared.header.folder), prepared.data_fingerprint()
    settings = {key: str(value) for key, value in flat(config)}
    world.require_same(settings | {"base model": base_fingerprint, "data": data_fingerprint})
    environment = describe_environment(str(world.device), base_fingerprint, data_fingerprint)
    environment |= {f"{name}_fingerprint": value for name, value in prepared.fingerprints().items()}
    # A run that goes on keeps its micro-batches, whatever is free now: sums are rounded in the same order.
    tokens = config.train.micro_batch_tokens
    if tokens == "auto" or all(change.key != "train.micro_batch_tokens" for change in changes):
        tokens = run_dir.read_environment(run).get("micro_batch_tokens") or tokens
    if tokens == "auto":  # only then is the model looked at
        longest = int(prepared.train.examples.lengths.max())
        tokens = estimate_memory(prepared.header, config, longest, world.device, launch.current()).tokens
    environment |= {"processes": world.size, "micro_batch_tokens": tokens}
    if config.model.quantization == "nf4":
        environment["bitsandbytes"] = bitsandbytes().__version__
    if config.model.trust_remote_code:
        environment["remote_code"] = remote_code.hashes(prepared.header.folder)
    environment["model_type"] = str(prepared.header.config.model_type)
    counted = {"train": prepared.train_counts, "validation": prepared.validation_counts, "test": prepared.test_counts}
    environment["data"] = {
        name: {"rows": counts.rows, "targets": counts.targets} for name, counts in counted.items() if counts
    }
    for name, held_out in (("validation", prepared.validation), ("test", prepared.test)):
        environment[f"{name}_fingerprint"] = held_out.fingerprint() if held_out else None
    ours: dict[str, Any] = world.from_main(environment)
    return ours


def _require_room(config: RunConfig, run: RunDir, prepared: "Prepared") -> None:
    """Raise SurroundingsError where the disk has not the room for what the run will still write."""
    from lora_cli import checkpoint

    one = checkpoint.size(prepared.trained_parameters(config.lora.rank))
    most = (config.save.keep + 2) * one + one // 3  # those kept, the best, the one being written; the adapter
    room.require_room(run.path, max(one, most - room.size_of(run.path)))


def describe_environment(device: str, base_fingerprint: str, data_fingerprint: str) -> dict[str, Any]:
    """Return what the numbers of a run depend on beside its config; an allow-list, so never a secret."""
    import safetensors
    import torch
    import transformers

    return {
        "lora": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "base_fingerprint": base_fingerprint,
        "data_fingerprint": data_fingerprint,
    }
