"""The LoRA layer (Hu et al. 2021, arXiv 2106.09685), by wrapping: W x + gain * scale * B (A x).

`gain` is a run-time number: 1 is the tuned model, 0 the base model itself, in the same process and for free. With a
magnitude it is DoRA's layer; a gain is then the share of the way from the base's output to its own.
"""

import math
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.dropout import Dropout, row_keys
from lora_cli.magnitude import row_norms
from lora_cli.pissa import principal_factors
from lora_cli.projection import Projection, project

MAGNITUDE = "lora_magnitude_vector"


class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank update: lora_A [rank, in], lora_B [out, rank], both float32.

    DoRA's has a magnitude [out] too, float32. PiSSA's has the A and B it started from, frozen, to take off their
    product: the base stays as it is.
    """

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        has_magnitude: bool = False,
        has_start: bool = False,
    ) -> None:
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
        self.magnitude = nn.Parameter(torch.zeros(out_features, device=device)) if has_magnitude else None
        self.register_buffer("start_down", torch.zeros_like(self.lora_A.data) if has_start else None)
        self.register_buffer("start_up", torch.zeros_like(self.lora_B.data) if has_start else None)
        self._norm: tuple[object, Tensor] | None = None  # and what it was computed of
        self.training = False
        self.shared = SharedInput([self])

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if self.gain == 0.0:
            base: Tensor = self.base(x)
            return base
        output = self.shared.output_of(self, x) if torch.is_grad_enabled() else self._output(x)
        return output if self.magnitude is None or self.gain == 1.0 else torch.lerp(self.base(x), output, self.gain)

    def _output(self, x: Tensor) -> Tensor:
        down, up = self.factors()
        low = F.linear(x, down.to(x.dtype)) * self.strength  # [..., rank]
        update = F.linear(low, up.to(x.dtype))
        return self.base(x) + update if self.magnitude is None else self.finished(x @ self._weight() + update)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the A and B whose product is added.

        With a start that is B (A - A0) + (B - B0) A0: of B A - B0 A0 the same, and nothing where nothing has moved, in
        half precision too.
        """
        if self.start_down is None or self.start_up is None:
            return self.lora_A, self.lora_B
        down = torch.cat([self.lora_A - self.start_down, self.start_down])
        return down, torch.cat([self.lora_B, self.lora_B - self.start_up], 1)

    @property
    def strength(self) -> float:
        """What B (A x) is multiplied by."""
        return self.scale * self.gain if self.magnitude is None else self.scale

    def finished(self, output: Tensor) -> Tensor:
        """Return what the layer makes of its projection's output: with a magnitude, each number's share and the bias.

        A share is not rounded to half precision, where it would differ by more than training moves it.
        """
        if self.magnitude is None:
            return output
        scaled = output * (self.magnitude / self.norm())
        return (scaled if self.base.bias is None else scaled + self.base.bias).to(output.dtype)

    @torch.compiler.disable
    @torch.inference_mode(False)  # or what is kept could not be used in training
    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the norm of each row of W + scale * B A [out], computed again only where A or B were changed."""
        made_of = (self.lora_A._version, self.lora_B._version, self.scale)
        if self._norm is None or self._norm[0] != made_of:
            self._norm = made_of, row_norms(self._weight().T, self.lora_A, self.lora_B, self.scale)
        return self._norm[1]

    def active_dropout(self, rows: int) -> Dropout | None:
        """Return the dropout of this forward, None where there is none.

        Rows that are not the tokens of the batch, as where a model has few of them pass a layer, have keys that follow
        from all of them.
        """
        if not self.training or not self.dropout:
            return None
        keys = next((keys for keys in self.tokens.keys if len(keys) == rows), None)
        if keys is None:
            keys = row_keys(rows, self.tokens.keys, self.lora_A.device)
        return Dropout(self.dropout, self.seed, keys)

    def projection(self) -> Projection:
        """Return what `project` needs of this layer."""
        bias = self.base.bias if self.magnitude is None else None
        return Projection(self._weight, bias, *self.factors(), self.strength)

    def _weight(self) -> Tensor:
        """Return the base's weight [in, out]."""
        weight: Tensor = self.base.weight
        return weight if is_conv1d(self.base) else weight.T

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """A uniform in +-1/sqrt(in) (variance 1/(3 in), as in the paper's code), B zero: the update starts at zero.

        With a start, at what PiSSA takes from the weight.
        """
        if self.start_down is not None and self.start_up is not None:
            down, up = principal_factors(self._weight().T, self.rank, self.scale, seed)
            self.load(torch.cat([down, down]), torch.cat([up, -up], 1))
            return
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(self.lora_A.shape, generator=generator, dtype=torch.float32) * 2 * bound - bound
        self.lora_A.copy_(start)
        self.lora_B.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(self.norm())

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by PEFT's names."""
        magnitude = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, **magnitude}

    def written(self) -> dict[str, Tensor]:
        """Return what a file holds of the layer: with a start [A; A0] and [B, -B0], whose product is the update."""
        if self.start_down is None or self.start_up is None:
            return {**self.trained()}
        down, up = torch.cat([self.lora_A, self.start_down]), torch.cat([self.lora_B, -self.start_up], 1)
        return {"lora_A": down, "lora_B": up}

    @torch.no_grad()
    def load(self, down: Tensor, up: Tensor, magnitude: Tensor | None = None) -> None:
        """Take what `written` gave, to the bit."""
        if self.start_down is not None and self.start_up is not None:
            (down, start), (up, less) = down.split(self.rank), up.split(self.rank, 1)
            self.start_down.copy_(start)
            self.start_up.copy_(-less)
        self.lora_A.copy_(down)
        self.lora_B.copy_(up)
        if self.magnitude is not None and magnitude is not None:
            self.magnitude.copy_(magnitude)

    def merged(self) -> Tensor:
        """Return the one weight [out, in] that does what the layer does, in the adapter's dtype."""
        weight = self._weight().T.to(self.lora_A.dtype)
        down, up = self.factors()
        tuned = weight + up @ down * self.strength
        if self.magnitude is None:
            return tuned
        return torch.lerp(weight, tuned * (self.magnitude / self.norm())[:, None], self.gain)


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
        return layer.finished(self._outputs.pop(layer))


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a layer is GPT-2's `Conv1D`: a linear layer that stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    if is_conv1d(module):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    return int(module.in_features), int(module.out_features)
