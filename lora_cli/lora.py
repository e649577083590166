"""An adapter in a model: which layers get one, how it is put on, found, switched and taken off."""

import contextlib
import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_cli.config import LoraConfig
from lora_cli.errors import ModelError
from lora_cli.lora_linear import LoraLinear, SharedInput, Tokens, is_conv1d
from lora_cli.quantised import QuantisedLinear
from lora_cli.randomness import derive_seed


@contextlib.contextmanager
def sharing_inputs(model: nn.Module) -> Iterator[None]:
    """Run one forward of the model in the block; layers that are given the same tensor in it share it from then on."""
    given: list[tuple[LoraLinear, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: given.append((module, inputs[0])))
        for _, layer in lora_layers(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, list[LoraLinear]] = {}
    for layer, x in given:  # which are alive, so that no two have one id
        groups.setdefault(id(x), []).append(layer)
    for layers in groups.values():
        shared = SharedInput(list(dict.fromkeys(layers)))
        for layer in layers:
            layer.shared = shared


def scale_of(method: str, alpha: float, rank: int) -> float:
    """Return the update's scale: alpha/rank, or alpha/sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if method == "rslora" else alpha / rank


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by its path, the output head left out."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear | QuantisedLinear) or is_conv1d(module)) and module is not head
    }


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Return the paths to adapt. `all-linear` is every linear layer inside the numbered blocks.

    Raises ModelError naming every entry of the list that matches nothing.
    """
    linear = linear_modules(model)
    if target_modules == "all-linear":
        if found := [path for path in linear if re.search(r"\.\d+\.", f".{path}.")]:
            return found
        raise ModelError(
            "lora.target_modules: all-linear found no linear layer in this model's blocks; is config.json that of this "
            "model?"
        )
    names = Counter(path.rsplit(".", 1)[-1] for path in linear)
    problems, matched = [], set()
    for name in target_modules:
        hits = [path for path in linear if path == name or path.endswith(f".{name}")]
        matched.update(hits)
        if not hits:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else "."
            others = [path for path, _ in model.named_modules() if path == name or path.endswith(f".{name}")]
            if others:
                hint = f"; {others[0]} is not a linear layer inside a block, and only those can be adapted."
            problems.append(f'lora.target_modules: no linear layer is named "{name}"{hint}')
    if problems:
        there = ", ".join(f"{name} (x{count})" for name, count in names.items())
        raise ModelError(*problems, f"{type(model).__name__} has: {there}.")
    return [path for path in linear if path in matched]


def wrap(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, float]],
    dropout: float = 0.0,
    has_magnitude: bool = False,
    has_start: bool = False,
) -> None:
    """Freeze the model and wrap the named layers in place; `shapes` gives (rank, scale) of each path."""
    model.requires_grad_(False)
    tokens = Tokens()
    for path, (rank, scale) in shapes.items():
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        layer = LoraLinear(parent.get_submodule(name), rank, scale, dropout, has_magnitude, has_start)
        layer.tokens = tokens
        setattr(parent, name, layer)


def apply_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze the model and give it a fresh adapter, in place. The logits stay as they were, bit for bit."""
    scale = scale_of(config.method, config.alpha, config.rank)
    targets = find_targets(model, config.target_modules)
    shapes = dict.fromkeys(targets, (config.rank, scale))
    wrap(model, shapes, config.dropout, config.method == "dora", config.init == "pissa")
    for path, layer in lora_layers(model):
        layer.reset(derive_seed(seed, "lora_A", path))


def remove_lora(model: nn.Module) -> None:
    """Take the adapter off, in place; what is left is the base."""
    for path, layer in list(lora_layers(model)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Iterate over (path, adapted layer), in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name (`<path>.lora_A`, `<path>.lora_B`, DoRA's magnitude)."""
    return {
        f"{path}.{name}": parameter for path, layer in lora_layers(model) for name, parameter in layer.trained().items()
    }


def written(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter's file holds, by the same names."""
    return {f"{path}.{name}": tensor for path, layer in lora_layers(model) for name, tensor in layer.written().items()}


def taken_from_base(model: nn.Module) -> Iterator[Tensor]:
    """Iterate over what a fresh adapter has computed from the base's weights, which devices may round differently."""
    for _, layer in lora_layers(model):
        if layer.magnitude is not None:
            yield layer.magnitude.data
        if layer.start_down is not None and layer.start_up is not None:
            yield from (layer.lora_A.data, layer.lora_B.data, layer.start_down, layer.start_up)


def set_dropout(model: nn.Module, seed: int | None) -> None:
    """Switch the adapter's dropout on, with a seed, or off. The base's own is not used: it stays in inference mode."""
    model.eval()
    for path, layer in lora_layers(model):
        layer.training = seed is not None
        if seed is not None and layer.dropout:
            layer.seed = derive_seed(seed, path)


def set_keys(model: nn.Module, *keys: Tensor) -> None:
    """Say which tokens the adapted layers may be given in the next forward, by their keys."""
    for _, layer in itertools.islice(lora_layers(model), 1):
        layer.tokens.keys = keys  # which all layers have


@contextlib.contextmanager
def gain(model: nn.Module, value: float) -> Iterator[None]:
    """Run a block with the adapter scaled by `value`: 0 is the base."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.gain for layer in layers]
    try:
        for layer in layers:
            layer.gain = value
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.gain = old


@torch.no_grad()
def merge_in_place(model: nn.Module) -> None:
    """Add every adapter's update to its base's weight, rounded to that weight's dtype, and unwrap the layers."""
    for _, layer in lora_layers(model):
        assert not isinstance(layer.base, QuantisedLinear), "an update added to it would be lost"
        merged = layer.merged()
        layer.base.weight.copy_(merged.T if is_conv1d(layer.base) else merged)
    remove_lora(model)
