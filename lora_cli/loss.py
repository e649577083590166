"""The loss as a sum that travels, and cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # target positions whose logits exist at the same time


@dataclass(frozen=True)
class LossSum:
    """Summed negative log-likelihood (nats, float64 scalar) over `targets` tokens. Sums add; `mean` divides once.

    `correct` counts targets that were the most likely token; it is counted only where no gradient is wanted.
    """

    total: Tensor
    targets: int
    correct: int = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.total + other.total, self.targets + other.targets, self.correct + other.correct)

    @property
    def mean(self) -> float:
        return float(self.total.detach()) / self.targets

    @property
    def accuracy(self) -> float:
        return self.correct / self.targets


ZERO = LossSum(torch.zeros((), dtype=torch.float64), 0)


@dataclass(frozen=True)
class HeadForm:
    """How a model turns the output embedding's products into logits: softcap * tanh(scale * product / softcap).

    Cohere multiplies by a scale, Granite divides by one, Gemma 2 caps.
    """

    scale: float = 1.0
    softcap: float | None = None


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy in chunks, the gradient towards the hidden states made in the forward pass.

    The head is frozen: it gets no gradient. One chunk of logits [C, V] exists at a time, and is turned into its own
    gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: HeadForm
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)  # [N, D]
        # One for all chunks: memory that is new in each is slow to write to.
        room = hidden.new_empty(min(len(labels), CHUNK), len(weight))
        for part in _chunks(len(labels)):
            x = hidden[part]
            logits = torch.mm(x, weight.T, out=room[: len(x)])  # [C, V]
            if bias is not None:
                logits += bias
            logits = _wide(logits)
            if form.scale != 1.0:
                logits.mul_(form.scale)
            capped = None
            if form.softcap is not None:
                capped = logits.div_(form.softcap).tanh_()
                logits = capped * form.softcap
            picked = labels[part, None]
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, picked) - largest
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(1, keepdim=True)
            total += (sums.log() - chosen).sum(dtype=torch.float64)
            exponentials.scatter_add_(1, picked, -sums)  # sums * (softmax - one-hot)
            if capped is not None:
                exponentials.mul_(1 - capped.square_())
            if weight.dtype == logits.dtype:  # divided behind the product, where there is less to divide
                torch.mm(exponentials, weight, out=gradient[part])
                gradient[part].mul_(form.scale / sums)
            else:
                torch.mm(exponentials.mul_(form.scale / sums).to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(count: int) -> Iterator[slice]:
    """Cut `count` rows into equal chunks of at most CHUNK."""
    size = -(-count // -(-count // CHUNK)) if count else 1
    return (slice(begin, begin + size) for begin in range(0, count, size))


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: HeadForm) -> LossSum:
    """Return the loss of `hidden` [N, D] against `labels` [N], through a frozen output head [V, D]."""
    if hidden.requires_grad and torch.is_grad_enabled():
        return LossSum(_HeadLoss.apply(hidden, weight, bias, labels, form), len(labels))
    result = ZERO
    for part in _chunks(len(labels)):
        result = result + logits_loss(head_logits(hidden[part], weight, bias, form), labels[part])
    return result


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: HeadForm) -> Tensor:
    """Return the logits [N, V] of `hidden` [N, D]."""
    logits = F.linear(hidden, weight, bias) * form.scale
    return logits if form.softcap is None else torch.tanh(logits / form.softcap) * form.softcap


def logits_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Return the loss of `logits` [N, V] against `labels` [N]; for heads that are not a plain linear layer."""
    losses = F.cross_entropy(_wide(logits), labels, reduction="none")
    correct = 0 if torch.is_grad_enabled() else int((logits.argmax(-1) == labels).sum())
    return LossSum(losses.sum(dtype=torch.float64), len(labels), correct)
