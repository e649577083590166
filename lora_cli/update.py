"""What is added to a base's weights: one adapter, or several together.

linear   the sum of w_i s_i B_i A_i, exact; of one adapter by itself DoRA too, whose other half `weights` adds
ties     each update trimmed to its largest entries, a sign elected for each, those that agree averaged
         (Yadav et al. 2023, arXiv 2306.01708)
dare     entries dropped at random and the others scaled up for them, then summed (Yu et al. 2023, arXiv 2311.03099)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli.adapter import Adapter, require_low_rank
from lora_cli.errors import AdapterError, InputError
from lora_cli.randomness import derive_seed

Method = Literal["linear", "ties", "dare"]
DENSITIES = {"linear": 1.0, "ties": 0.2, "dare": 0.1}  # the papers' own


@dataclass(frozen=True)
class Update:
    """The updates of adapters, each with a weight. `density` is the share of entries that TIES and DARE keep."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    method: Method = "linear"
    density: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.adapters):
            raise InputError(f"--weights: {len(self.adapters)} adapters need as many, found {len(self.weights)}.")
        if self.method == "ties" and min(self.weights) <= 0:
            raise InputError("--weights: TIES elects signs by weight, so each must be above 0.")
        if not 0 < self.density <= 1:
            raise InputError(f"--density: must be above 0 and at most 1, not {self.density:g}.")
        for adapter in self.adapters:
            if [*self.weights] != [1.0] or self.method != "linear":
                require_low_rank(adapter, "`lora merge` takes it alone, and with a weight of 1.")
            if not any(tensor.any() for tensor in adapter.lora_B.values()):
                raise AdapterError(f"{adapter.folder}: every lora_B is zero: this adapter is untrained.")

    @classmethod
    def of(cls, adapter: Adapter) -> "Update":
        """Return the update of one adapter as it is."""
        return cls([adapter], [1.0])

    @property
    def paths(self) -> list[str]:
        """The layers that are changed."""
        return list(dict.fromkeys(path for adapter in self.adapters for path in adapter.lora_A))

    def shape(self, path: str) -> tuple[int, int]:
        """Return (out, in) of a layer's update."""
        adapter = next(each for each in self.adapters if path in each.lora_A)
        return len(adapter.lora_B[path]), adapter.lora_A[path].shape[1]

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] whose product is the linear update, weights and scales in B."""
        those = [(w, each) for w, each in zip(self.weights, self.adapters, strict=True) if path in each.lora_A]
        up = torch.cat([each.lora_B[path] * (w * each.scales[path]) for w, each in those], 1)
        return torch.cat([each.lora_A[path] for _, each in those]), up

    def output(self, path: str, x: Tensor) -> Tensor:
        """Return what a layer adds to its output [..., out] for an input [..., in], without making its matrix."""
        if self.method == "linear":
            down, up = self.factors(path)
            return F.linear(F.linear(x, down), up)
        return F.linear(x, self.matrix(path))

    def matrix(self, path: str) -> Tensor:
        """Return a layer's update [out, in], float32."""
        if self.method == "linear":
            down, up = self.factors(path)
            return up @ down
        parts = [
            (weight, index, (adapter.lora_B[path] @ adapter.lora_A[path]) * adapter.scales[path])
            for index, (weight, adapter) in enumerate(zip(self.weights, self.adapters, strict=True))
            if path in adapter.lora_A
        ]
        match self.method:
            case "ties":
                return _elect([(weight, _largest(matrix, self.density)) for weight, _, matrix in parts])
            case "dare":
                total = torch.zeros(self.shape(path))
                for weight, index, matrix in parts:
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, "dare", path, index))
                    kept = torch.rand(matrix.shape, generator=generator) < self.density
                    total += torch.where(kept, matrix * (weight / self.density), 0.0)
                return total
            case _:
                assert_never(self.method)

    def low_rank(self, path: str) -> tuple[Tensor, Tensor, float]:
        """Return A [rank, in], B [out, rank] of one adapter for all, and the share of the update they keep.

        Exact for linear. Else the best of the adapters' ranks together (its singular vectors): the share is that of the
        sum of squares.
        """
        down, up = self.factors(path)
        if self.method == "linear":
            return down, up, 1.0
        matrix, rank = self.matrix(path), min(len(down), *self.shape(path))
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        root = sizes[:rank].sqrt()
        kept = float(sizes[:rank].square().sum() / sizes.square().sum().clamp_min(1e-38))
        return root[:, None] * right[:rank], left[:, :rank] * root, kept


def _largest(matrix: Tensor, density: float) -> Tensor:
    """Return a matrix with all but its largest entries set to zero; `density` of them stay."""
    dropped = round(matrix.numel() * (1 - density))
    if dropped == 0:
        return matrix
    threshold = matrix.abs().flatten().kthvalue(dropped).values
    return torch.where(matrix.abs() > threshold, matrix, 0.0)


def _elect(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the weighted mean, entry by entry, of those matrices whose sign there is that of the weighted sum."""
    sign = torch.stack([weight * matrix for weight, matrix in parts]).sum(0).sign()
    total, agreeing = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, matrix in parts:
        agrees = (matrix.sign() == sign) & (matrix != 0)
        total += torch.where(agrees, weight * matrix, 0.0)
        agreeing += torch.where(agrees, weight, 0.0)
    return torch.where(agreeing > 0, total / agreeing.clamp_min(1e-38), 0.0)
