"""`lora train`: a run from its config to its adapter, written down as it goes."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lora_cli import __version__, data, run_dir
from lora_cli.config import RunConfig
from lora_cli.errors import Interrupted, UserError
from lora_cli.interrupt import StopRequest
from lora_cli.records import Evaluated, Event, Finished, Notice, Started, StepDone, as_json


def ended(config: RunConfig) -> Finished | None:
    """Return how a run of this config ended, when it is finished; raises when the folder cannot be used."""
    run = run_dir.of(config)
    run_dir.require_usable(run, config)
    return run_dir.read_finished(run)


def train(config: RunConfig, stop: StopRequest) -> Iterator[Event]:
    """Train, or continue an interrupted run of the same config; yield what happens and write it down.

    Raises UserError: InputError and SurroundingsError before anything is written, TrainingStopped, Interrupted.
    """
    data.require_readable(config.data, config.eval.general_source)

    from lora_cli.prepare import prepare  # torch is imported only once config and rows are good

    prepared = yield from prepare(config)
    for text in prepared.notices:
        yield Notice(text)

    from lora_cli import adapter, adapter_folder, lora, model, remote_code
    from lora_cli.distributed import current_world, memory_error
    from lora_cli.forgetting import Validation
    from lora_cli.loop import Loop
    from lora_cli.memory import estimate_memory

    run, world = run_dir.of(config), current_world()
    base_fingerprint = model.fingerprint(prepared.header.folder)
    environment = describe_environment(str(world.device), base_fingerprint, prepared.data_fingerprint())
    # A run that goes on keeps its micro-batches, whatever is free now: sums are rounded in the same order.
    tokens = run_dir.read_environment(run).get("micro_batch_tokens") or config.train.micro_batch_tokens
    if tokens == "auto":  # only then is the model looked at
        longest = int(prepared.train.examples.lengths.max())
        tokens = estimate_memory(prepared.header, config, longest, world.device).tokens
    environment["micro_batch_tokens"] = tokens
    if config.model.trust_remote_code:
        environment["remote_code"] = remote_code.hashes(prepared.header.folder)
    environment["model_type"] = str(prepared.header.config.model_type)
    counted = {"train": prepared.train_counts, "validation": prepared.validation_counts, "test": prepared.test_counts}
    environment["data"] = {
        name: {"rows": counts.rows, "targets": counts.targets} for name, counts in counted.items() if counts
    }
    for name, held_out in (("validation", prepared.validation), ("test", prepared.test)):
        environment[f"{name}_fingerprint"] = held_out.fingerprint() if held_out else None
    language_model = model.load_model(prepared.header, config.model, world.device)
    for end in sorted(prepared.ends):
        if problem := model.untrained_end(language_model, prepared.header.tokenizer, end):
            yield Notice(problem)
    with run_dir.held(run):
        run_dir.create(run, config, environment)
        if (warning := run_dir.warning(run)) is not None:
            yield Notice(warning)
        templates = prepared.template.files(*adapter.TEMPLATES) if prepared.template and prepared.templated else {}
        origin = adapter_folder.Origin(config.model.path, config.model.revision, base_fingerprint, templates)
        validation = None
        if prepared.validation is not None:
            validation = Validation(language_model, prepared.validation, prepared.general)
        loop = Loop(config, run, language_model, prepared.train, validation, prepared.test, origin, stop, tokens)
        yield from loop.restore()
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
        run_dir.write_status(run, "running", step=loop.state.step, pid=os.getpid())
        stop.saving = True
        finished = False
        try:
            for event in loop:
                if isinstance(event, StepDone | Evaluated):
                    run_dir.append(run, event)
                if isinstance(event, Finished):
                    facts = {key: value for key, value in as_json(event).items() if key != "adapter"}
                    run_dir.write_status(run, "finished", **facts)
                    finished = True
                yield event
        except BaseException as caught:
            error = memory_error(caught) or caught
            if not finished:
                state = "stopped" if isinstance(error, Interrupted | GeneratorExit) else "failed"
                reason = error.problems[0] if isinstance(error, UserError) else type(error).__name__
                progress = asdict(loop.state.stopping)
                run_dir.write_status(run, state, step=loop.state.step, reason=reason, **progress)
            if error is caught:
                raise
            raise error from caught


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
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "base_fingerprint": base_fingerprint,
        "data_fingerprint": data_fingerprint,
    }
