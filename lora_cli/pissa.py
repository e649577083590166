"""PiSSA's start (Meng et al. 2024, arXiv 2404.02948): A and B from the largest singular vectors of the frozen weight.

They are found by subspace iteration (Halko, Martinsson and Tropp 2011, doi 10.1137/090771806): all singular values of a
matrix of 4096 x 4096 take minutes. What is trained starts at the weight itself, however near they come.
"""

import torch
from torch import Tensor

_MORE = 16  # vectors beyond twice the rank, by which the largest are told from the next
_TIMES = 16


@torch.no_grad()
def principal_factors(weight: Tensor, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank]: scale * B A is what the largest singular values make of W [out, in]."""
    wide = weight.float()
    columns = min(*wide.shape, 2 * rank + _MORE)
    start = torch.randn(wide.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    basis = start.to(wide.device)  # [in, columns]
    for _ in range(_TIMES):
        basis = torch.linalg.qr(wide.T @ (wide @ basis)).Q
    left, sizes, right = torch.linalg.svd(wide @ basis, full_matrices=False)
    root = (sizes[:rank] / scale).sqrt()
    return root[:, None] * (right[:rank] @ basis.T), left[:, :rank] * root
