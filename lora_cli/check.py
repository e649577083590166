"""`lora check`: what a run would do, found by the code that would do it; no weight is read, no run is begun."""

import random
import time
from collections import Counter
from collections.abc import Generator, Iterator

import torch

from lora_cli import examples, launch, notices, runtimes
from lora_cli.config import RunConfig
from lora_cli.data_reader import News
from lora_cli.dataset import Dataset
from lora_cli.distributed import current_world, is_here
from lora_cli.errors import DataError
from lora_cli.launch import Launch
from lora_cli.layout import decoder_blocks
from lora_cli.memory import estimate_memory
from lora_cli.model import choose_dtype
from lora_cli.prepare import Prepared, prepare
from lora_cli.randomness import derive_seed
from lora_cli.reports import CheckReport, RowPreview
from lora_cli.timetable import Timetable

_SHOWN = 5  # rows, chosen at random
_SHARE_OF_PEAK = 0.5  # of matrix products that a training step reaches
_SECONDS_A_LAYER = 0.01  # of a forward and its backward


def check(config: RunConfig, row: str | None = None, nproc: int = 1) -> Generator[News, None, CheckReport]:
    """Prepare a run of `nproc` processes and report on it; `row` names one row to show: its number, or `file:number`.

    Neither the weights nor the device have to be here. Else raises what training would raise before its first step.
    """
    launch.require_alone("a check takes no step that could be shared")
    prepared = yield from prepare(config, weights=False)
    train = prepared.train
    timetable = Timetable.of(train.mixture.drawn, config)
    trainable, total = prepared.trained_parameters(config.lora), prepared.total_parameters(config.lora)
    here = is_here(config.model.device)
    device = current_world(config.model.device).device if here else torch.device(config.model.device)
    longest, started = int(train.examples.lengths.max()), Launch(size=nproc, local_size=nproc)
    mean = float(train.examples.lengths.mean())
    memory = estimate_memory(prepared.header, config, longest, device, started, mean)
    seconds = None
    if here and nproc == 1:
        seconds = estimate_seconds(prepared, timetable, total, config, device, memory.tokens)
    produced = runtimes.Produced(
        str(prepared.header.config.model_type),
        config.lora.method,
        config.lora.written_rank,
        frozenset(path.rsplit(".", 1)[-1] for path in prepared.targets),
    )
    shown = _some_rows(train.examples, config.seed) if row is None else _named_row(prepared, row)
    return CheckReport(
        train=prepared.train_counts,
        validation=prepared.validation_counts,
        test=prepared.test_counts,
        replay=prepared.replay_counts,
        overlap=prepared.overlap,
        examples_per_epoch=train.mixture.drawn,
        steps_per_epoch=timetable.steps_per_epoch,
        total_steps=timetable.total_steps,
        seconds=seconds,
        previews=[RowPreview(example.where, examples.preview(example, prepared.header.tokenizer)) for example in shown],
        modules=dict(Counter(path.rsplit(".", 1)[-1] for path in prepared.targets)),
        trainable_parameters=trainable,
        total_parameters=total,
        memory=memory,
        runtimes=runtimes.verdicts(produced) if prepared.targets else [],
        notices=[*_not_here(prepared, config), *notices.of(prepared, config)],
    )


def _not_here(prepared: Prepared, config: RunConfig) -> Iterator[str]:
    """Say what training will need and this machine does not have."""
    if not is_here(config.model.device):
        yield f"model.device: {config.model.device} is not here: memory is that of such a device, the time not known."
    if not list(prepared.header.folder.glob("*.safetensors")):  # an index of them may be
        yield f"{prepared.header.folder}: has no weights here (.safetensors); this check needs none, training does."


def _some_rows(dataset: Dataset, seed: int) -> Iterator[examples.Example]:
    chosen = random.Random(derive_seed(seed, "preview")).sample(range(len(dataset)), min(_SHOWN, len(dataset)))
    return (dataset[index] for index in sorted(chosen))


def _named_row(prepared: Prepared, row: str) -> list[examples.Example]:
    """Return the sequences of a row, in whichever set it is. Raises DataError."""
    name, _, number = row.rpartition(":")
    if not number.isdecimal():
        raise DataError(f'--row: expected a row\'s number, or file:number; found "{row[:80]}".')
    sets = [prepared.train.examples, *([prepared.validation] if prepared.validation else [])]
    found = [
        index_set[int(index)]
        for index_set in sets
        for index in (index_set.column("numbers") == int(number)).nonzero()[0]
        if name in ("", index_set.file(int(index)).name)
    ]
    if not found:
        raise DataError(f"--row: no sequence comes from row {row}; it was left out, or there is no such row.")
    return found


def estimate_seconds(
    prepared: Prepared, timetable: Timetable, parameters: int, config: RunConfig, device: torch.device, tokens: int
) -> float:
    """Estimate how long training takes; rough, from the speed of a matrix product here, measured for a moment.

    A step with a frozen base takes 4 operations a parameter and token (2 forward, 2 towards the input), 2 more for a
    trained weight, a validation pass 2, and so does the base wherever it is asked. To that comes what every layer of
    every forward costs however small it is, most of the time of a tiny model (measured on stories260k).
    """
    mean = float(prepared.train.examples.lengths.mean())
    trained = mean * timetable.total_steps * config.train.batch_size
    passes = timetable.total_steps / timetable.steps_per_epoch * config.eval.per_epoch + 1
    evaluated = passes * prepared.validation_counts.tokens if prepared.validation_counts else 0
    evaluated += passes * sum(map(len, prepared.general or ()))
    asked = sum((config.train.kl_to_base > 0, config.train.surprise_limit is not None))
    of_step = 6 if config.lora.method == "full" else 4
    operations = parameters * ((of_step + 2 * asked) * trained + 2 * evaluated)
    speed = _operations_a_second(choose_dtype(config.model.dtype, device), device) * _SHARE_OF_PEAK
    forwards = (trained + evaluated / 3) / tokens
    return operations / speed + forwards * len(decoder_blocks(prepared.skeleton)[1]) * _SECONDS_A_LAYER


def _operations_a_second(dtype: torch.dtype, device: torch.device) -> float:
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
