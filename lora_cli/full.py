"""Full fine-tuning: every parameter of the base is trained, and the base itself is kept beside it.

As with an adapter, `gain` is a run-time number: 1 is the tuned model, 0 the base, by showing the model other tensors;
what lies between (base + gain * change) is made anew.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError

_PLACE = "_full_tuning"  # in a module's own dictionary, where nothing of torch's looks


@dataclass(frozen=True)
class Weight:
    """A parameter as it was loaded, and as it is trained; tied ones are one."""

    parameter: nn.Parameter
    base: Tensor
    tuned: Tensor

    def at(self, gain: float) -> Tensor:
        """Return it at a gain; at 0 and 1 without copying."""
        if gain in (0.0, 1.0):
            return self.tuned if gain else self.base
        with torch.inference_mode(False), torch.no_grad():  # made in that mode, it could not become a parameter's
            return torch.lerp(self.base, self.tuned, gain)


class Tuning:
    """The parameters of a model that are trained, by name, and the gain at which the model shows them."""

    def __init__(self, weights: dict[str, Weight]) -> None:
        self.weights = weights
        self.gain = 1.0

    def show(self, gain: float) -> None:
        """Have the model compute with what its weights are at a gain."""
        for weight in self.weights.values():
            weight.parameter.data = weight.at(gain)
        self.gain = gain


def of(model: nn.Module) -> Tuning | None:
    """Return how a model is fully tuned; None where it is not."""
    found: Tuning | None = model.__dict__.get(_PLACE)
    return found


def apply_full(model: nn.Module) -> None:
    """Make every parameter of a model a trained one, in place, its numbers those of the base. Raises ModelError."""
    if others := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        raise ModelError(f"lora.method: full trains weights in float32, and this base is loaded in {found}.")
    weights = {}
    for name, parameter in model.named_parameters():
        base = parameter.data
        parameter.data = base.clone()
        weights[name] = Weight(parameter, base, parameter.data)
    model.requires_grad_(True)
    model.__dict__[_PLACE] = Tuning(weights)


def remove_full(model: nn.Module) -> None:
    """Leave the base, in place, where a model was fully tuned."""
    if (tuning := of(model)) is None:
        return
    tuning.show(0.0)
    for weight in tuning.weights.values():
        weight.parameter.grad = None
    model.requires_grad_(False)
    del model.__dict__[_PLACE]


@contextlib.contextmanager
def gain(tuning: Tuning, value: float) -> Iterator[None]:
    """Run a block with the change of the weights scaled by `value`: 0 is the base."""
    before = tuning.gain
    try:
        tuning.show(value)
        yield
    finally:
        tuning.show(before)
