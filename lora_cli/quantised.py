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
from collections.abc import Iterable, Iterator
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.errors import SurroundingsError

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
        pieces: Iterable[Tensor],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        """Quantise a weight [out, in], in pieces [rows, in] of which all but the last have a multiple of BLOCK rows."""
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.out_features, self.in_features = shape
        self.bias = bias
        self.training = False
        match kind:
            case "nf4":
                packed, buffers = _to_nf4(pieces)
            case "int8":
                packed, buffers = _to_int8(pieces)
            case _:
                assert_never(kind)
        self.packed = nn.Parameter(packed, requires_grad=False)
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
    return QuantisedLinear(kind, (out, inner), [weight], None, torch.float32).weight


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
