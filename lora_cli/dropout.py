"""Which of an adapter's inputs are dropped: a function of the seed, the layer and the tokens read so far, of no more.

So it makes no difference which sequences share a forward, whether a common beginning runs once, on which rank it runs.
Numbers come from a counter and a hash: splitmix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Return the number that has the same 64 bits in two's complement."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_BASE = _signed(0xD6E8FEB86659FD93)  # any odd number: of the polynomial of a sequence's tokens


class Dropout(NamedTuple):
    """Every element of an input [T, features] is dropped with a chance, the same ones for the same seed and keys."""

    chance: float
    seed: int
    keys: Tensor  # [T], int64

    def draw(self, features: int) -> Tensor:
        """Return which elements are dropped, counted in one row; one may be named twice.

        A number for each element takes five times as long to draw as one for each that is dropped. Drawing k of n again
        and again from all leaves an element out with a chance of (1 - 1/n)^k; the last draw counts by chance.
        """
        left, draws = 1.0, 0
        while left * (1 - 1 / features) > 1 - self.chance:
            left, draws = left * (1 - 1 / features), draws + 1
        last = features * (1 - (1 - self.chance) / left)
        counter = torch.arange(draws + 1, device=self.keys.device) * _STEP + self.seed
        numbers = _mixed(self.keys[:, None] + counter)  # [T, draws + 1]
        places = (((numbers >> 33) & 0x7FFFFFFF) * features) >> 31
        places += torch.arange(len(self.keys), device=self.keys.device)[:, None] * features
        counts = (numbers[:, -1] & 0xFFFFFFFF) < round(last * 2**32)
        if not draws:
            return places[counts, 0]
        places[:, -1] = torch.where(counts, places[:, -1], places[:, 0])
        return places.flatten()


def token_keys(ids: Sequence[int]) -> Tensor:
    """Return a key for each token of a sequence [T], int64: of that token and all before it."""
    powers = torch.full((len(ids),), _BASE).cumprod(0)
    return _mixed(((torch.tensor(ids) + 1) * powers).cumsum(0))


def row_keys(rows: int, of: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return a key for each of some rows [rows], int64, which follow from the keys of all tokens."""
    return _mixed(torch.arange(rows, device=device) + sum(keys.sum() for keys in of))


def _mixed(numbers: Tensor) -> Tensor:
    """Return numbers in whose bits no pattern is left, in the place of those given (64 bits, which wrap)."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        numbers.bitwise_xor_((numbers >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return numbers.bitwise_xor_((numbers >> 31).bitwise_and_((1 << 33) - 1))
