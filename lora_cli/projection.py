"""Base and update as one differentiable function, for all adapted layers that read the same input.

y = x W + scale * (x A^T) B^T. Autograd would keep x twice and add whole outputs; here the update is accumulated into
the base's output, the layers' A are one product, x is kept once, and W (frozen) gets no gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """One adapted layer: its frozen weight [in, out], bias [out] or None, lora_A [rank, in], lora_B [out, rank]."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float


class _Project(torch.autograd.Function):
    """All layers of one input; products in the input's dtype, sums over micro-batches in the adapter's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], dropout: float, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = (tensors[kind::4] for kind in range(4))
        inputs = x.reshape(-1, x.shape[-1])  # [T, in]
        seen, dropped = inputs, None
        if dropout:
            dropped = draw_dropped(inputs, dropout)
            seen = inputs.clone()
            seen.view(-1).index_fill_(0, dropped, 0.0)
        A = torch.cat([each.to(x.dtype) for each in As])  # [all ranks, in]
        low = seen @ A.T  # [T, all ranks]
        ranks = [len(each) for each in As]
        outputs = []
        for weight, bias, B, scale, part in zip(weights, biases, Bs, scales, low.split(ranks, dim=1), strict=True):
            part.mul_(scale / (1 - dropout))
            output = torch.mm(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)
            outputs.append(output.addmm_(part, B.to(x.dtype).T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(seen, dropped, low, A, *weights, *Bs)
        ctx.scales, ctx.dropout, ctx.ranks = scales, dropout, ranks
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        seen, dropped, low, A, *rest = ctx.saved_tensors
        weights, Bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        grad_x, grad_low, grad_Bs = None, [], []
        for weight, B, scale, part, grad in zip(
            weights, Bs, ctx.scales, low.split(ctx.ranks, dim=1), grad_outputs, strict=True
        ):
            grad_output = grad.reshape(-1, grad.shape[-1])  # [T, out]
            grad_Bs.append((grad_output.T @ part).to(B.dtype))
            grad_low.append((grad_output @ B.to(A.dtype)).mul_(scale / (1 - ctx.dropout)))
            if not ctx.needs_input_grad[0]:  # below the first adapted layer there is nothing to train
                continue
            grad_x = grad_output @ weight.T if grad_x is None else grad_x.addmm_(grad_output, weight.T)
        together = torch.cat(grad_low, dim=1)  # [T, all ranks]
        grad_As = (together.T @ seen).to(Bs[0].dtype).split(ctx.ranks)
        if grad_x is not None:
            if dropped is None:
                grad_x.addmm_(together, A)
            else:
                update = together @ A
                update.view(-1).index_fill_(0, dropped, 0.0)
                grad_x.add_(update)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], -1)
        flat = (gradient for A_B in zip(grad_As, grad_Bs, strict=True) for gradient in (None, None, *A_B))
        return (grad_x, None, None, *flat)


def draw_dropped(x: Tensor, dropout: float) -> Tensor:
    """Return which elements of x, counted in one row, are dropped: each with a chance of `dropout`.

    A number for each element takes five times as long to draw as one for each that is dropped. Drawing k of n again and
    again from all leaves an element out with a chance of exp(-k/n).
    """
    draws = round(-x.numel() * math.log1p(-dropout))
    return torch.randint(x.numel(), (draws,), device=x.device)


def project(x: Tensor, layers: Sequence[Projection], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """Return the outputs [..., out] of layers that read `x` [..., in]; one dropout mask is drawn for all of them."""
    tensors = [tensor for layer in layers for tensor in layer[:4]]
    return _Project.apply(x, [layer.scale for layer in layers], dropout, *tensors)
