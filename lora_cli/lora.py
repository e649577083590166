"""The LoRA layer (Hu et al. 2021, arXiv 2106.09685), by wrapping: W x + gain * scale * B (A x).

`gain` is a run-time number: 1 is the tuned model, 0 the base model itself, in the same process and for free.
"""

import contextlib
import difflib
import itertools
import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.config import LoraConfig
from lora_cli.dropout import Dropout
from lora_cli.errors import ModelError
from lora_cli.projection import Projection, project
from lora_cli.quantised import QuantisedLinear
from lora_cli.randomness import derive_seed


class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank update: lora_A [rank, in], lora_B [out, rank], both float32."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        in_features, out_features = linear_shape(base)
        device = next(base.parameters()).device
        self.base = base
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        self.seed = 0  # of what is dropped
        self.tokens = Tokens()
        self.gain = 1.0
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=torch.float32))
        self.training = False
        self.shared = SharedInput([self])

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if self.gain != 0.0 and torch.is_grad_enabled():
            return self.shared.output_of(self, x)
        output: Tensor = self.base(x)
        if self.gain == 0.0:
            return output
        low = F.linear(x, self.lora_A.to(x.dtype)) * (self.scale * self.gain)  # [..., rank]
        return output + F.linear(low, self.lora_B.to(x.dtype))

    def active_dropout(self, rows: int) -> Dropout | None:
        """Return the dropout of this forward, None where there is none.

        Rows that are not the tokens of the batch, as where a model has few of them pass a layer, have keys by chance.
        """
        if not self.training or not self.dropout:
            return None
        known = [keys for keys in self.tokens.keys if len(keys) == rows]
        keys = known[0] if known else torch.randint(1 << 62, (rows,), device=self.lora_A.device)
        return Dropout(self.dropout, self.seed, keys)

    def projection(self) -> Projection:
        """Return what `project` needs of this layer."""
        return Projection(self._weight, self.base.bias, self.lora_A, self.lora_B, self.scale * self.gain)

    def _weight(self) -> Tensor:
        """Return the base's weight [in, out]."""
        weight: Tensor = self.base.weight
        return weight if is_conv1d(self.base) else weight.T

    def reset(self, seed: int) -> None:
        """A uniform in +-1/sqrt(in) (variance 1/(3 in), as in the paper's code), B zero: the update starts at zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(self.lora_A.shape, generator=generator, dtype=torch.float32) * 2 * bound - bound
        with torch.no_grad():
            self.lora_A.copy_(start)
            self.lora_B.zero_()


class Tokens:
    """What a model's adapted layers may read in the next forward, by the keys of the tokens: [T] all, [M] targets."""

    keys: tuple[Tensor, ...] = ()


class SharedInput:
    """Layers that read the same tensor: all are computed when the first is asked, and each output is given out once."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = layers
        self._input: weakref.ref[Tensor] | None = None
        self._outputs: dict[LoraLinear, Tensor] = {}

    @torch.compiler.disable
    def output_of(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """Return one layer's output [..., out] for `x` [..., in]."""
        if layer not in self._outputs or self._input is None or self._input() is not x:
            projections = [each.projection() for each in self.layers]
            outputs = project(x, projections, self.layers[0].active_dropout(x.shape[:-1].numel()))
            self._outputs = dict(zip(self.layers, outputs, strict=True))
            self._input = weakref.ref(x)
        return self._outputs.pop(layer)


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


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a layer is GPT-2's `Conv1D`: a linear layer that stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    if is_conv1d(module):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    return int(module.in_features), int(module.out_features)


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


def wrap(model: nn.Module, shapes: Mapping[str, tuple[int, float]], dropout: float = 0.0) -> None:
    """Freeze the model and wrap the named layers in place; `shapes` gives (rank, scale) of each path."""
    model.requires_grad_(False)
    tokens = Tokens()
    for path, (rank, scale) in shapes.items():
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        layer = LoraLinear(parent.get_submodule(name), rank, scale, dropout)
        layer.tokens = tokens
        setattr(parent, name, layer)


def apply_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze the model and give it a fresh adapter, in place. The logits stay as they were, bit for bit."""
    scale = scale_of(config.method, config.alpha, config.rank)
    targets = find_targets(model, config.target_modules)
    wrap(model, dict.fromkeys(targets, (config.rank, scale)), config.dropout)
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
    """Return the adapter's parameters by name (`<path>.lora_A`, `<path>.lora_B`)."""
    return {
        f"{path}.{name}": parameter
        for path, layer in lora_layers(model)
        for name, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }


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
        update = layer.lora_B @ layer.lora_A * (layer.scale * layer.gain)
        weight = layer.base.weight
        weight.copy_(weight.float() + (update.T if is_conv1d(layer.base) else update))
    remove_lora(model)
