"""TrainState <-> directory: what was trained, the optimizer's moments and a few numbers. No pickle.

Trained is an adapter, whose directory it then is, or the whole model.

Data order, learning rate and dropout are functions of (seed, step), so nothing else is needed to go on exactly.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from lora_cli import adapter, full, full_folder, json_file, manifest, metrics, run_dir, storage, tuning
from lora_cli.config import LoraConfig
from lora_cli.errors import AdapterError
from lora_cli.run_dir import RunDir
from lora_cli.tensor_file import write_whole

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass
class Stopping:
    """Early stopping's memory. `best_*` is the evaluation to keep; the reference moves by more than min_delta.

    An evaluation is better than another where it is less over the forgetting budget; where both are within it (or there
    is none) by its validation loss.
    """

    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    best_forgetting: float | None = None
    best_excess: float = 0.0  # what the best forgets over the budget
    reference: float | None = None
    reference_excess: float = 0.0
    without_improvement: int = 0

    def update(
        self, step: int, loss: float, min_delta: float, forgetting: float | None = None, budget: float | None = None
    ) -> bool:
        """Take in a validation loss and a rise of loss on general text; return whether they are the best so far."""
        excess = max(0.0, forgetting - budget) if forgetting is not None and budget is not None else 0.0
        if self.reference is None or (excess, loss) < (self.reference_excess, self.reference - min_delta):
            self.reference, self.reference_excess = loss, excess
            self.without_improvement = 0
        else:
            self.without_improvement += 1
        is_best = self.best_loss is None or (excess, loss) < (self.best_excess, self.best_loss)
        if is_best:
            self.best_loss, self.best_step, self.best_forgetting = loss, step, forgetting
            self.best_excess = excess
        return is_best

    def judge_anew(self, budget: float | None) -> None:
        """Hold the best so far against another forgetting budget; what was not the best is not known any more."""
        over = 0.0 if budget is None or self.best_forgetting is None else self.best_forgetting - budget
        self.best_excess = self.reference_excess = max(0.0, over)
        self.reference = self.best_loss


@dataclass(frozen=True)
class _Numbers:
    """What state.json holds."""

    step: int
    stopping: Stopping
    evaluated: bool = True


@dataclass
class TrainState:
    """Everything a run needs to go on. The loop owns it and changes it in place."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    stopping: Stopping
    evaluated: bool = True  # False until the validation that is due after `step` is taken into `stopping`


def save(run: RunDir, state: TrainState, save_trained: Callable[[Path], None]) -> Path:
    """Write the checkpoint of the current step and return its folder; it appears whole or not at all.

    What was measured before is on the medium by then, so that a run that goes on from here has it. One that is there
    already stays, unless it is damaged or its step's validation had not been taken in.
    """
    metrics.keep(run)
    path = run_dir.checkpoint_path(run, state.step)
    if path.exists() and (manifest.problems_in(path) or is_evaluated(path) < state.evaluated):
        storage.remove_directory(path)
    if not path.exists():
        with storage.explained(path), storage.new_directory(path) as folder:
            save_trained(folder)
            tensors = {
                f"{name}.{moment}": value
                for name, parameter in tuning.trainable(state.model).items()
                for moment, value in state.optimizer.state[parameter].items()
            }
            write_whole(folder / OPTIMIZER, tensors)
            numbers = {"step": state.step, "stopping": asdict(state.stopping), "evaluated": state.evaluated}
            storage.add_json(folder / STATE, {"format": run_dir.FORMAT, **numbers})
    return path


def size(parameters: int, config: LoraConfig) -> int:
    """Return about how many bytes a checkpoint takes: what is trained, both moments, and the small files."""
    return (2 + config.written_rank // config.rank) * 4 * parameters + (1 << 16)


def load(path: Path, state: TrainState) -> None:
    """Load a checkpoint into a state whose model is prepared to be trained. Raises AdapterError."""
    numbers = _read_state(path)
    load_trained(path, state.model)
    try:
        moments = safetensors.torch.load_file(path / OPTIMIZER)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path / OPTIMIZER}: cannot be read: {error}.", state="Nothing was read.") from None
    for name, parameter in tuning.trainable(state.model).items():
        state.optimizer.state[parameter] = {
            # AdamW keeps its step counter on the CPU unless told otherwise; the moments stay with their parameter.
            moment: value.to(parameter.device)
            for moment in ("step", "exp_avg", "exp_avg_sq")
            if (value := moments.get(f"{name}.{moment}")) is not None
        }
    state.step, state.stopping = numbers.step, numbers.stopping
    state.evaluated = numbers.evaluated


def load_trained(path: Path, model: nn.Module) -> None:
    """Load what was trained, of a checkpoint or a run's result, into a model prepared for it. Raises AdapterError."""
    if full.of(model) is None:
        adapter.load_weights(model, adapter.read(path))
    else:
        full_folder.load(path, model)


def read_numbers(path: Path) -> tuple[int, Stopping]:
    """Return a checkpoint's step and early-stopping state. Raises AdapterError where a newer version wrote it."""
    numbers = _read_state(path)
    return numbers.step, numbers.stopping


def is_evaluated(path: Path) -> bool:
    """Return whether the validation due after a checkpoint's step is part of it: not where a stop cut it short."""
    return _read_state(path).evaluated


def _read_state(path: Path) -> _Numbers:
    return json_file.checked(_Numbers, run_dir.read_facts(path / STATE), path / STATE)


def latest(run: RunDir) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, and what is wrong with any newer one."""
    problems: list[str] = []
    for _, path in run_dir.step_folders(run):
        if not (found := manifest.problems_in(path)):
            return path, problems
        problems += found
    return None, problems


def prune(run: RunDir, keep: int, written: Path | None = None) -> None:
    """Delete checkpoints beyond the newest `keep` whole ones and the best ones these refer to.

    `written` is one that `save` has just returned; it is not read again.
    """
    folders = [path for _, path in run_dir.step_folders(run)]
    whole = [path for path in folders if path == written or not manifest.problems_in(path)]
    kept = set(whole[:keep])
    for path in whole[:keep]:
        _, stopping = read_numbers(path)
        if stopping.best_step is not None:
            kept.add(run_dir.checkpoint_path(run, stopping.best_step))
    for path in whole[keep:]:
        if path not in kept:
            storage.remove_directory(path)
