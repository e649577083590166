"""The loss as a sum that travels, and cross-entropy that never holds the logits of a whole batch."""

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


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy in chunks, the gradient towards the hidden states made in the forward pass.

    The head is frozen: it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)  # [N, D]
        for begin in range(0, len(labels), CHUNK):
            part = slice(begin, begin + CHUNK)
            log_probs = F.log_softmax(F.linear(hidden[part], weight, bias).float(), dim=-1)  # [C, V]
            picked = labels[part, None]
            total -= log_probs.gather(1, picked).sum(dtype=torch.float64)
            probs = log_probs.exp_()
            probs.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=probs.dtype))
            torch.mm(probs.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), None, None, None


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> LossSum:
    """Return the loss of `hidden` [N, D] against `labels` [N], through a frozen output head [V, D]."""
    if hidden.requires_grad and torch.is_grad_enabled():
        return LossSum(_HeadLoss.apply(hidden, weight, bias, labels), len(labels))
    result = ZERO
    for begin in range(0, len(labels), CHUNK):
        part = slice(begin, begin + CHUNK)
        result = result + logits_loss(F.linear(hidden[part], weight, bias), labels[part])
    return result


def logits_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Return the loss of `logits` [N, V] against `labels` [N]; for heads that are not a plain linear layer."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    correct = 0 if torch.is_grad_enabled() else int((logits.argmax(-1) == labels).sum())
    return LossSum(losses.sum(dtype=torch.float64), len(labels), correct)
