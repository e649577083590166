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
from lora_cli.sharding import as_part, keep_own, own_part, own_rows

Kind = Literal["nf4", "int8"]
BLOCK = 64  # numbers that share a scale (nf4)
_SCALES = 256  # of them, that share a scale of their own


class QuantisedLinear(nn.Module):
    """x W^T + b, W [out, in] quantised; `weight` makes it anew in `dtype` whenever it is asked for."""

    packed: nn.Parameter
    scales: Tensor  # of every row (int8), of every BLOCK numbers in eight bits (nf4)
    scales_of_scales: Tensor  # nf4
    mean_scale: Tensor  # nf4

    def __init__(
        self,
        kind: Kind,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        """Plan a layer: `make_room` and `quantise` give it numbers.

        `transposed`: those come as a weight [in, out], as GPT-2 stores it.
        """
        super().__init__()
        self.kind, self.dtype, self.transposed = kind, dtype, transposed
        self.out_features, self.in_features = shape
        self.bias = bias
        self.training = False
        with torch.device("meta"):
            match kind:
                case "nf4":
                    blocks = -(-shape[0] * shape[1] // BLOCK)
                    packed = torch.empty(-(-shape[0] * shape[1] // 2), 1, dtype=torch.uint8)
                    self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
                    self.register_buffer("scales_of_scales", torch.empty(-(-blocks // _SCALES)))
                    self.register_buffer("mean_scale", torch.empty(()))
                case "int8":
                    packed = torch.empty(shape, dtype=torch.int8)
                    self.register_buffer("scales", torch.empty(shape[0]))
                case _:
                    assert_never(kind)
        self.packed = nn.Parameter(packed, requires_grad=False)

    def make_room(self, device: torch.device) -> None:
        """Take the memory that the layer needs on a device, for this rank's part where it is divided."""
        first, after = own_rows(self.packed)
        own = torch.empty(after - first, *self.packed.shape[1:], dtype=self.packed.dtype, device=device)
        self.packed = nn.Parameter(as_part(self.packed, own), requires_grad=False)
        for name, buffer in self.named_buffers():
            self.register_buffer(name, torch.empty_like(buffer, device=device))

    @torch.no_grad()
    def quantise(self, pieces: Iterable[Tensor]) -> "QuantisedLinear":
        """Take the weight in pieces [rows, columns], of which all but the last have a multiple of BLOCK rows."""
        if self.transposed:
            pieces = [torch.cat([piece.clone() for piece in pieces]).T]
        (first, _), own = own_rows(self.packed), own_part(self.packed)
        place, scales = 0, list[Tensor]()
        for piece in pieces:
            wide = piece.float()
            if self.kind == "int8":
                scales.append(wide.abs().amax(1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny))
                some = (wide / scales[-1][:, None]).round_()
            else:
                some, state = bitsandbytes().functional.quantize_4bit(
                    wide.contiguous(), None, None, BLOCK, False, "nf4"
                )
                scales.append(state.absmax)
            keep_own(own, first, place, some)
            place += len(some)
        every = torch.cat(scales)
        if self.kind == "int8":
            self.scales.copy_(every)
            return self
        self.mean_scale.copy_(every.mean())
        some, state = bitsandbytes().functional.quantize_blockwise(every - self.mean_scale, blocksize=_SCALES)
        self.scales.copy_(some)
        self.scales_of_scales.copy_(state.absmax)
        return self

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


def round_trip(kind: Kind, weight: Tensor) -> Tensor:
    """Return what quantisation leaves of a weight [out, in], in float32."""
    rows, columns = weight.shape
    layer = QuantisedLinear(kind, (rows, columns), None, torch.float32)
    layer.make_room(weight.device)
    return layer.quantise([weight]).weight


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
