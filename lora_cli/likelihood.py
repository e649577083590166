"""What several models say of the same tokens: how likely they are, which is the most likely, how far from the first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.loss import Head, HeadForm, chunks, formed, pieces, widened


def compare_logits(logits: Iterable[Tensor], labels: Tensor) -> Tensor:
    """Return, of each model's logits [N, V], what they say of `labels` [N]: [models, 3, N].

    The three are the negative log-likelihood, whether the label is the most likely token, and KL(first model || this).
    """
    first, found = None, []
    for each in logits:
        log = widened(each).log_softmax(-1)
        likelihood = log.gather(1, labels[:, None])[:, 0]
        kl = torch.zeros_like(likelihood) if first is None else (first.exp() * (first - log)).sum(1)
        first = log if first is None else first
        found.append(torch.stack([-likelihood, (log.argmax(-1) == labels).to(log.dtype), kl]))
    return torch.stack(found)


def compare_states(states: Sequence[Tensor], heads: Sequence[Head], labels: Tensor, form: HeadForm) -> Tensor:
    """Return what `compare_logits` does, of each model's hidden states [N, D] before its head.

    No row of logits is made: the heads' rows come in pieces, as in training on a CPU.
    """
    parts = chunks(len(labels))
    found = [_in_pieces([each[part] for each in states], heads, labels[part, None], form) for part in parts]
    return torch.cat(found, -1)


@dataclass
class _Read:
    """What the pieces of a model's logits gave so far, [C, 1] each; sums are of exp(logit - largest), or times that.

    `apart` sums how far the first model's logits are above these, each times the first model's exponential.
    """

    largest: Tensor
    most_likely: Tensor
    at_label: Tensor
    sums: Tensor
    apart: Tensor

    @property
    def all_together(self) -> Tensor:
        """The logarithm of the sum of all exponentials."""
        return self.largest + self.sums.log()


def _in_pieces(states: Sequence[Tensor], heads: Sequence[Head], labels: Tensor, form: HeadForm) -> Tensor:
    zero = widened(states[0].new_zeros(len(labels), 1))
    models = [_Read(zero - torch.inf, torch.zeros_like(labels), zero, zero, zero) for _ in states]
    for of_each in zip(*(pieces(*head, labels) for head in heads), strict=True):
        first: tuple[Tensor, Tensor, Tensor] | None = None
        for x, piece, model in zip(states, of_each, models, strict=True):
            logits, _ = formed(torch.mm(x, piece.rows.T), piece.bias, form)
            largest, where = logits.max(1, keepdim=True)
            model.most_likely = torch.where(largest > model.largest, where + piece.begin, model.most_likely)
            model.at_label = torch.where(piece.inside, logits.gather(1, piece.place), model.at_label)
            before, model.largest = model.largest, torch.maximum(model.largest, largest)
            shrunk = (before - model.largest).exp_()
            exponentials = (logits - model.largest).exp_()
            model.sums = model.sums * shrunk + exponentials.sum(1, keepdim=True)
            if first is None:
                first = logits, exponentials, shrunk
            else:
                above = torch.linalg.vecdot(first[1], first[0] - logits)
                model.apart = model.apart * first[2] + above[:, None]
    base = models[0]
    said = [
        [
            model.all_together - model.at_label,
            (model.most_likely == labels).to(zero.dtype),
            model.apart / base.sums - base.all_together + model.all_together,
        ]
        for model in models
    ]
    return torch.stack([torch.cat(three, 1).T for three in said])
