"""The loss as a sum that travels, and cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # target positions whose logits exist at the same time
_PIECE = 1024  # rows of the head that a CPU multiplies at once: the products of more do not stay in its caches

Head = tuple[Tensor, Tensor | None]  # weight [V, D], bias [V]

_NOTHING = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class LossSum:
    """What is minimised, summed over `targets` tokens (nats, float64 scalars). Sums add; `mean` divides once.

    `penalty` is the part of `total` that is not negative log-likelihood; no gradient flows through it.
    """

    total: Tensor
    targets: int
    penalty: Tensor = _NOTHING

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.total + other.total, self.targets + other.targets, self.penalty + other.penalty)

    @property
    def mean(self) -> float:
        """The mean negative log-likelihood."""
        return float(self.total.detach() - self.penalty) / self.targets


ZERO = LossSum(_NOTHING, 0)


@dataclass(frozen=True)
class Pull:
    """`weight` times KL(base || tuned) at every target, which keeps the tuned model near the base.

    `base` is what the base has at the targets: hidden states [N, D], or logits [N, V] for a head of the model's own.
    `head` is the base's weight and bias, where those of the tuned model may be others.
    `without_target` leaves the target token out of both distributions, so that the two losses do not pull at the same
    probability (Mask the Target, arXiv 2605.29498).
    """

    base: Tensor
    weight: float
    without_target: bool
    head: Head | None = None


@dataclass(frozen=True)
class HeadForm:
    """How a model turns the output embedding's products into logits: softcap * tanh(scale * product / softcap).

    Cohere multiplies by a scale, Granite divides by one, Gemma 2 caps.
    """

    scale: float = 1.0
    softcap: float | None = None


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy in chunks, all gradients made in the forward pass.

    They are those of the hidden states, and of the head where it is trained. At most one chunk of logits [C, V] exists
    at a time, and is turned into its own gradient in place. Returns (what is minimised, the pull's part of it).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        form: HeadForm,
        pull: Pull | None,
    ) -> tuple[Tensor, Tensor]:
        total, penalty = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(2))
        gradient = torch.empty_like(hidden)  # [N, D]
        ctx.mark_non_differentiable(penalty)
        if goes_in_pieces(weight.device, weight.dtype, pull is not None, any(ctx.needs_input_grad[1:3])):
            for part in chunks(len(labels)):
                total += _in_pieces(hidden[part], weight, bias, labels[part, None], form, gradient[part])
            ctx.save_for_backward(gradient)
            ctx.of_head = None, None
            return total, penalty
        of_weight, of_bias = (
            torch.zeros_like(each) if wanted and each is not None else None
            for each, wanted in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        # One for all chunks: memory that is new in each is slow to write to.
        room = hidden.new_empty(min(len(labels), CHUNK), len(weight))
        for part in chunks(len(labels)):
            x = hidden[part]
            logits, capped = formed(_products(x, weight, room[: len(x)]), bias, form)
            picked = labels[part, None]
            pulled = None
            if pull is not None:
                base_logits = head_logits(pull.base[part], *(pull.head or (weight, bias)), form)
                kl, pulled = _kl(base_logits, logits, picked, pull.without_target)
                penalty += pull.weight * kl.sum(dtype=torch.float64)
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, picked) - largest
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(1, keepdim=True)
            total += (sums.log() - chosen).sum(dtype=torch.float64)
            exponentials.scatter_add_(1, picked, -sums)  # sums * (softmax - one-hot)
            if pull is not None and pulled is not None:
                exponentials.addcmul_(pulled, sums, value=pull.weight)
            if capped is not None:
                exponentials.mul_(1 - capped.square_())
            scale = form.scale / sums  # multiplied into what has fewer numbers than the logits
            if of_weight is not None:
                of_weight.addmm_(exponentials.T, x * scale)
            if of_bias is not None:
                of_bias.addmv_(exponentials.T, scale[:, 0])
            if weight.dtype == logits.dtype:
                torch.mm(exponentials, weight, out=gradient[part])
                gradient[part].mul_(scale)
            else:
                torch.mm(exponentials.mul_(scale).to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.of_head = of_weight, of_bias  # handed over to one backward pass, which need not copy them
        return total + penalty, penalty

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factor = grad_total.to(gradient.dtype)
        of_weight, of_bias = (None if each is None else each.mul_(factor) for each in ctx.of_head)
        del ctx.of_head
        return gradient * factor, of_weight, of_bias, None, None, None


def goes_in_pieces(device: torch.device, dtype: torch.dtype, has_pull: bool, is_trained: bool) -> bool:
    """Return whether no whole rows of logits [V] are made: on a CPU, where nothing needs one and nothing is rounded."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and not has_pull and not is_trained


def _in_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: HeadForm, gradient: Tensor
) -> Tensor:
    """Return the summed loss of `x` [C, D] against `labels` [C, 1]; write what it gives each number of x.

    The head's rows come in pieces, whose logits stay in the processor's caches: what was summed before is scaled
    to the largest logit so far (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    largest, sums, chosen = (x.new_full((len(x), 1), start) for start in (-torch.inf, 0.0, 0.0))
    at_label = torch.ones_like(chosen)  # the slope of the cap there
    gradient.zero_()
    for piece in pieces(weight, bias, labels):
        logits, capped = formed(torch.mm(x, piece.rows.T), piece.bias, form)
        slope = None if capped is None else capped.square_().neg_().add_(1)
        chosen = torch.where(piece.inside, logits.gather(1, piece.place), chosen)
        before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
        shrunk = (before - largest).exp_()
        exponentials = logits.sub_(largest).exp_()
        sums = sums * shrunk + exponentials.sum(1, keepdim=True)
        if slope is not None:
            at_label = torch.where(piece.inside, slope.gather(1, piece.place), at_label)
            exponentials.mul_(slope)
        gradient.mul_(shrunk).addmm_(exponentials, piece.rows)
    gradient.div_(sums).addcmul_(weight[labels[:, 0]], at_label, value=-1).mul_(form.scale)
    return (sums.log() + (largest - chosen)).sum(dtype=torch.float64)


class Piece(NamedTuple):
    """Some rows of a head, their bias, and the row from which on; where each label [C, 1] lies in it, if `inside`."""

    rows: Tensor
    bias: Tensor | None
    begin: int
    place: Tensor
    inside: Tensor


def pieces(weight: Tensor, bias: Tensor | None, labels: Tensor) -> Iterator[Piece]:
    """Cut a head into as many rows as a CPU multiplies at once."""
    for begin in range(0, len(weight), _PIECE):
        rows = weight[begin : begin + _PIECE]
        place = labels - begin
        inside = (place >= 0) & (place < len(rows))
        some_bias = None if bias is None else bias[begin : begin + _PIECE]
        yield Piece(rows, some_bias, begin, place.clamp(0, len(rows) - 1), inside)


def _products(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write the products of `x` [C, D] with a head's weight [V, D] into `out` [C, V], and return it."""
    size = _PIECE if weight.device.type == "cpu" else len(weight)
    for rows, columns in zip(weight.split(size), out.split(size, 1), strict=True):
        torch.mm(x, rows.T, out=columns)
    return out


def formed(products: Tensor, bias: Tensor | None, form: HeadForm) -> tuple[Tensor, Tensor | None]:
    """Turn a head's products [C, V] into logits, in their place where they can be; and the tanh of what is capped."""
    if bias is not None:
        products += bias
    logits = widened(products)
    if form.scale != 1.0:
        logits.mul_(form.scale)
    if form.softcap is None:
        return logits, None
    capped = logits.div_(form.softcap).tanh_()
    return capped * form.softcap, capped


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _kl(base_logits: Tensor, logits: Tensor, labels: Tensor, without_target: bool) -> tuple[Tensor, Tensor]:
    """Return KL(base || tuned) [N] of logits [N, V], and its gradient towards the tuned ones [N, V].

    `without_target` takes the `labels` [N, 1] out of both distributions.
    """
    if without_target:
        base_logits, logits = (each.scatter(1, labels, -1e30) for each in (widened(base_logits), logits))
    log_q, log_p = widened(base_logits).log_softmax(-1), logits.log_softmax(-1)
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(1), log_p.detach().exp().sub_(q)


def chunks(count: int) -> Iterator[slice]:
    """Cut `count` rows into equal chunks of at most CHUNK."""
    size = -(-count // -(-count // CHUNK)) if count else 1
    return (slice(begin, begin + size) for begin in range(0, count, size))


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: HeadForm, pull: Pull | None = None
) -> LossSum:
    """Return the loss of `hidden` [N, D] against `labels` [N], through an output head [V, D]."""
    total, penalty = _HeadLoss.apply(hidden, weight, bias, labels, form, pull)
    return LossSum(total, len(labels), penalty)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: HeadForm) -> Tensor:
    """Return the logits [N, V] of `hidden` [N, D]."""
    logits = F.linear(hidden, weight, bias)
    if form.scale != 1.0:  # a copy of so many numbers takes a tenth of their products' time
        logits = logits * form.scale
    return logits if form.softcap is None else torch.tanh(logits / form.softcap) * form.softcap


def logits_loss(logits: Tensor, labels: Tensor, pull: Pull | None = None) -> LossSum:
    """Return the loss of `logits` [N, V] against `labels` [N]; for heads that are not a plain linear layer."""
    wide = widened(logits)
    total = F.cross_entropy(wide, labels, reduction="none").sum(dtype=torch.float64)
    if pull is None:
        return LossSum(total, len(labels))
    kl, _ = _kl(pull.base, wide, labels[:, None], pull.without_target)
    penalty = pull.weight * kl.sum(dtype=torch.float64)
    return LossSum(total + penalty, len(labels), penalty.detach())
