"""DoRA's weight (Liu et al. 2024, arXiv 2402.09353): m (W + scale * B A) / ||W + scale * B A||, a norm for each output.

The magnitude m [out] is trained beside A and B, and starts at ||W||. The norm is a constant in the gradient (section
4.3 of the paper).
"""

import torch
from torch import Tensor

_PIECE = 1 << 22  # numbers of a weight that are widened at once


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return the norm of each row of W + scale * B A [out], never 0.

    The weight is [out, in], A `down`, B `up`, whose dtype counts.
    """
    rows = max(1, _PIECE // weight.shape[1])
    norms = [
        torch.linalg.vector_norm(part.to(down.dtype) + rest @ down * scale, dim=1)
        for part, rest in zip(weight.split(rows), up.split(rows), strict=True)
    ]
    return torch.cat(norms).clamp_min_(torch.finfo(torch.float32).tiny)
