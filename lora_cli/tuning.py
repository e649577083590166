"""What is trained of a model, by whichever method: put on, taken off, and run at any strength."""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from lora_cli import full, lora
from lora_cli.config import LoraConfig


def apply(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Give a model something to train, in place: an adapter, or its own weights. Its logits stay as they were."""
    if config.method == "full":
        full.apply_full(model)
    else:
        lora.apply_lora(model, config, seed)


def remove(model: nn.Module) -> None:
    """Leave the base, in place."""
    full.remove_full(model)
    lora.remove_lora(model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    if (tuning := full.of(model)) is None:
        return lora.trainable(model)
    return {name: weight.parameter for name, weight in tuning.weights.items()}


def gain(model: nn.Module, value: float) -> AbstractContextManager[None]:
    """Run a block with what was trained scaled by `value`: 1 is the tuned model, 0 the base."""
    tuning = full.of(model)
    return lora.gain(model, value) if tuning is None else full.gain(tuning, value)


def weight_at(model: nn.Module, parameter: Tensor, value: float) -> Tensor:
    """Return what one of the model's own parameters is at a gain; an adapter changes none."""
    weights = tuning.weights.values() if (tuning := full.of(model)) else ()
    return next((weight.at(value) for weight in weights if weight.parameter is parameter), parameter)
