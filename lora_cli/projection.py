"""Base and update as one differentiable function, for all adapted layers that read the same input.

y = x W + scale * (x A^T) B^T. Autograd would keep x twice and add whole outputs; here the update is accumulated into
the base's output, the layers' A are one product, x is kept once, and W (frozen) gets no gradient. An x that is cheap to
make of tensors that are kept anyway is not kept: it is made again. So is what another function made, where it says how
(`remember`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.dropout import Dropout
from lora_cli.heap import roomy

Make = Callable[..., Tensor]  # elementwise: of tensors [..., in], one [..., in]


class Projection(NamedTuple):
    """One adapted layer: its frozen weight [in, out], bias [out] or None, lora_A [rank, in], lora_B [out, rank].

    The weight is asked for when it is multiplied, and again in the backward pass: it may be made anew each time.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float


def remember(x: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Return x, with the word that `make` makes it of tensors that are kept for the backward pass in any case.

    The word holds for x in another shape, too.
    """
    if torch.is_grad_enabled():
        x.lora_made = _Made(make, sources, x._version)
    return x


class _Made(NamedTuple):
    make: Callable[..., Tensor]
    sources: Sequence[Tensor]
    version: int  # of what was made: whoever changed it in place made it something else


def _how_made(x: Tensor) -> _Made | None:
    """Return how to make x again, its shape aside; None where nobody said so, or it was changed since."""
    origin = x if x._base is None else x._base
    made: _Made | None = getattr(origin, "lora_made", None)
    reshaped = x.numel() == origin.numel() and x.is_contiguous() and origin.is_contiguous()
    return made if made and reshaped and made.version == x._version else None


class _Project(torch.autograd.Function):
    """All layers of one input; products in the input's dtype, sums over micro-batches in the adapter's.

    `sources` of the tensors come first: the input itself, or what `make` makes it of; then lora_A and lora_B of each.
    """

    @staticmethod
    def forward(
        ctx: Any, make: Make | None, sources: int, layers: Sequence[Projection], dropout: Dropout | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        made_of, tensors = tensors[:sources], tensors[sources:]
        As, Bs = tensors[::2], tensors[1::2]
        x = make(*made_of) if make else made_of[0]
        inputs = x.reshape(-1, x.shape[-1])  # [T, in]
        dropped = dropout.draw(inputs.shape[1]) if dropout else None
        left = 1 - dropout.chance if dropout else 1.0
        seen = _without(inputs, dropped)
        A = torch.cat([each.to(x.dtype) for each in As])  # [all ranks, in]
        low = seen @ A.T  # [T, all ranks]
        ranks = [len(each) for each in As]
        outputs = []
        for layer, B, part in zip(layers, Bs, low.split(ranks, dim=1), strict=True):
            part.mul_(layer.scale / left)
            weight, bias = layer.weight(), layer.bias
            output = roomy((len(inputs), weight.shape[1]), inputs)
            if bias is None:
                torch.mm(inputs, weight, out=output)
            else:
                torch.addmm(bias, inputs, weight, out=output)
            outputs.append(output.addmm_(part, B.to(x.dtype).T).view(*x.shape[:-1], -1))
        made = None if make else _how_made(x)
        kept = made_of if make else made.sources if made else [seen]
        ctx.save_for_backward(dropped, low, A, *kept, *Bs)
        ctx.make, ctx.again, ctx.sources, ctx.kept, ctx.ranks = make, made and made.make, sources, len(kept), ranks
        ctx.frozen = [(layer.weight, layer.scale / left) for layer in layers]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        dropped, low, A, *rest = ctx.saved_tensors
        made_of, Bs = rest[: ctx.kept], rest[ctx.kept :]
        outgoing = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]  # [T, out] each
        grad_Bs = [
            (grad.T @ part).to(B.dtype) for grad, part, B in zip(outgoing, low.split(ctx.ranks, dim=1), Bs, strict=True)
        ]
        grad_low = [
            (grad @ B.to(A.dtype)).mul_(scale) for grad, B, (_, scale) in zip(outgoing, Bs, ctx.frozen, strict=True)
        ]
        together = torch.cat(grad_low, dim=1)  # [T, all ranks]
        x, origin = made_of[0], None
        if ctx.make:
            made_of = [source.detach().requires_grad_() for source in made_of]
            with torch.enable_grad():
                x = ctx.make(*made_of)
            origin = torch.autograd.graph.get_gradient_edge(x)  # x itself is not needed then
        elif ctx.again:
            x = ctx.again(*made_of)
        seen = x.detach().reshape(-1, A.shape[1])
        if ctx.make or ctx.again:
            seen = _without(seen, dropped)
        grad_As = (together.T @ seen).to(Bs[0].dtype).split(ctx.ranks)
        del x, seen
        grad_x = None
        if any(ctx.needs_input_grad[4 : 4 + ctx.sources]):  # below the first adapted layer there is nothing to train
            for (weight, _), grad in zip(ctx.frozen, outgoing, strict=True):
                grad_x = grad @ weight().T if grad_x is None else grad_x.addmm_(grad, weight().T)
        if grad_x is not None:
            if dropped is None:
                grad_x.addmm_(together, A)
            else:
                update = together @ A
                update.view(-1).index_fill_(0, dropped, 0.0)
                grad_x.add_(update)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], -1)
        grads = (grad_x,)
        if ctx.make:
            grads = (None,) * ctx.sources if grad_x is None else torch.autograd.grad(origin, made_of, grad_x)
        flat = (gradient for A_B in zip(grad_As, grad_Bs, strict=True) for gradient in A_B)
        return (None, None, None, None, *grads, *flat)


def _without(x: Tensor, dropped: Tensor | None) -> Tensor:
    """Return x with the dropped elements at zero; x itself where none are."""
    if dropped is None:
        return x
    seen = x.clone()
    seen.view(-1).index_fill_(0, dropped, 0.0)
    return seen


def project(
    x: Tensor | tuple[Tensor, ...],
    layers: Sequence[Projection],
    dropout: Dropout | None = None,
    make: Make | None = None,
) -> tuple[Tensor, ...]:
    """Return the outputs [..., out] of layers that read `x` [..., in], or what `make` makes of the tensors `x`.

    One dropout mask is drawn for all of them.
    """
    sources = x if isinstance(x, tuple) else (x,)
    trained = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    return _Project.apply(make, len(sources), layers, dropout, *sources, *trained)
