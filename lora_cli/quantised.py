"""Linear layers whose frozen weight is kept in four or eight bits, and made dense where it is multiplied.

`nf4` (Dettmers et al. 2023, arXiv 2305.14314): every 64 numbers in a row share a scale, each is one of 16 values that
are equally likely in a normal distribution, and the scales are kept in eight bits themselves: 0.516 bytes a number.
`int8`: every row has a scale, and each number is a whole one between -127 and 127 of it: 1 byte a number.

What is quantised are the weights as they are stored, in float32, whatever they are multiplied in; so it is the same on
every device.
"""

import contextlib
import importlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.errors import SurroundingsError
from lora_cli.sharding import as_part, own_rows

Kind = Literal["nf4", "int8"]
BLOCK = 64  # numbers that share a scale (nf4)
_SCALES = 256  # of them, that share a scale of their own


class QuantisedLinear(nn.Module):
    """x W^T + b, W [out, in] quantised; `weight` makes it anew in `dtype` whenever it is asked for."""

    packed: nn.Parameter
    scales: Tensor
    scales_of_scales: Tensor
    mean_scale: Tensor

    def __init__(
        self,
        kind: Kind,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        """Make a layer without numbers. `transposed`: those that come are of a weight [in, out], as GPT-2 stores it."""
        super().__init__()
        self.kind, self.dtype, self.transposed = kind, dtype, transposed
        self.out_features, self.in_features = shape
        self.bias = bias
        self.training = False
        match kind:
            case "nf4":
                packed = torch.empty((math.prod(shape) + 1) // 2, 1, dtype=torch.uint8, device="meta")
            case "int8":
                packed = torch.empty(shape, dtype=torch.int8, device="meta")
            case _:
                assert_never(kind)
        self.packed = nn.Parameter(packed, requires_grad=False)

    def quantise(self, pieces: Iterable[Tensor]) -> None:
        """Take the numbers of a weight, in pieces [rows, columns]; all but the last have a multiple of BLOCK rows.

        Where the layer is divided over ranks, this rank's part of them is kept.
        """
        if self.transposed:
            pieces = [torch.cat([piece.clone() for piece in pieces]).T]
        packed, buffers = _to_nf4(pieces) if self.kind == "nf4" else _to_int8(pieces)
        first, after = own_rows(self.packed)
        own = packed if after - first == len(packed) else packed[first:after].clone()
        self.packed = nn.Parameter(as_part(self.packed, own), requires_grad=False)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that is left after quantisation."""
        if self.kind == "int8":
            return self.packed.float().mul_(self.scales[:, None]).to(self.dtype)
        functional = bitsandbytes().functional
        scales = functional.dequantize_blockwise(self.scales, absmax=self.scales_of_scales, blocksize=_SCALES)
        state = functional.QuantState(
            absmax=scales + self.mean_scale,
            shape=torch.Size([2 * self.packed.numel()]),  # one row: of others not of whole blocks some kernels err
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        flat: Tensor = functional.dequantize_4bit(self.packed, state).flatten()
        return flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(x, self.weight, self.bias)


def _to_int8(pieces: Iterable[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    packed, scales = [], []
    for piece in pieces:
        scale = piece.float().abs().amax(1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
        packed.append((piece / scale[:, None]).round_().to(torch.int8))
        scales.append(scale)
    return _together(packed), {"scales": torch.cat(scales)}


def _to_nf4(pieces: Iterable[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    functional = bitsandbytes().functional
    packed, scales = [], []
    for piece in pieces:
        some, state = functional.quantize_4bit(piece.float().contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed.append(some)
        scales.append(state.absmax)
    every = torch.cat(scales)
    mean = every.mean()
    quantised, state = functional.quantize_blockwise(every - mean, blocksize=_SCALES)
    return _together(packed), {"scales": quantised, "scales_of_scales": state.absmax, "mean_scale": mean}


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def round_trip(kind: Kind, weight: Tensor) -> Tensor:
    """Return what quantisation leaves of a weight [out, in], in float32."""
    out, inner = weight.shape
    layer = QuantisedLinear(kind, (out, inner), None, torch.float32)
    layer.quantise([weight])
    return layer.weight


def require_installed(kind: Kind | None) -> None:
    """Raise SurroundingsError where a quantisation needs a package that is not installed."""
    if kind == "nf4":
        bitsandbytes()


def bitsandbytes() -> Any:
    """Return the package, imported when it is first asked for and without what it says of optional kernels."""
    try:
        with _quiet("bitsandbytes"):
            return importlib.import_module("bitsandbytes")
    except ImportError:
        raise SurroundingsError(
            "model.quantization: nf4 needs the package bitsandbytes, which is not installed: "
            "pip install 'lora-cli[quantization]'. int8 needs nothing."
        ) from None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
