"""What is done to a block of logits between its matrix products: each row's statistics, and the gradient in the logits' place.

Softmaxes stay unnormalised: a pass leaves normaliser * gradient behind and returns 1 / normaliser, which is cheaper to apply
to the rows of hidden states, shorter by far. Passes work in place and in scratch memory, which they need not be given.

Shapes: logits and scratch [rows, V] in the dtype of statistics; columns are [rows, 1]; row_stats [rows, 3] are loss in nats,
correct and alpha.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ARGMAX_BLOCK = 256
# Logits further below the largest count as this far below. exp(-50) is nothing even in float64, but an exp of less soon leads to
# denormal numbers, on which a CPU's matrix products take forty times as long.
LOWEST = -50.0


class Distributions(NamedTuple):
    """Teacher distributions p of U rows."""

    unnormalised: Tensor  # [U, V], p * normaliser, 1 at the largest
    normaliser: Tensor  # [U, 1]
    negative_entropy: Tensor  # [U, 1], sum p log p, in nats
    best: Tensor  # int64 [U, 1], argmax p

    def select(self, rows: Tensor, memory: Tensor | None) -> "Distributions":
        """Those of some rows, int64 [R]; the largest part in memory [R, V], if it is given."""
        return Distributions(torch.index_select(self.unnormalised, 0, rows, out=memory), *(column[rows] for column in self[1:]))


def ce(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against tokens, int64 [rows, 1]; leaves normaliser * (q - onehot). Returns row_stats, 1 / normaliser.

    A row whose target is -1 has none: zeros.
    """
    known, targets = targets >= 0, targets.clamp_min(0)
    logits.sub_(logits.amax(1, keepdim=True))
    target = logits.gather(1, targets)
    normaliser = logits.clamp_min_(LOWEST).exp_().sum(1, keepdim=True)
    unnormalised = target.exp()
    logits.scatter_(1, targets, unnormalised - normaliser)
    return torch.cat([normaliser.log() - target, target == 0, unnormalised / normaliser], 1) * known, known / normaliser


def distributions(logits: Tensor, scratch: Tensor | None) -> Distributions:
    """softmax(logits); its `unnormalised` takes the logits' place."""
    best = argmax(logits)
    logits.sub_(logits.gather(1, best))
    logits.clamp_min_(LOWEST)
    weighted_sum = torch.exp(logits, out=scratch).mul_(logits).sum(1, keepdim=True)
    normaliser = logits.exp_().sum(1, keepdim=True)
    return Distributions(logits, normaliser, weighted_sum / normaliser - normaliser.log(), best)


def kl_div(logits: Tensor, teacher: Distributions, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(p || q) to the teacher's p, row by row; leaves normaliser * (q - p). Returns row_stats, 1 / normaliser."""
    logits.sub_(logits.amax(1, keepdim=True))
    best = logits.gather(1, teacher.best)
    mean = torch.mul(teacher.unnormalised, logits, out=scratch).sum(1, keepdim=True) / teacher.normaliser
    normaliser = logits.clamp_min_(LOWEST).exp_().sum(1, keepdim=True)
    logits.addcmul_(teacher.unnormalised, normaliser / teacher.normaliser, value=-1)
    # sum min(p, q) = 1 - sum |q - p| / 2, because both sum to 1.
    alpha = 1 - torch.abs(logits, out=scratch).sum(1, keepdim=True) / (2 * normaliser)
    loss = teacher.negative_entropy - mean + normaliser.log()
    return torch.cat([loss, best == 0, alpha], 1), 1 / normaliser


def argmax(logits: Tensor) -> Tensor:
    """argmax(1, keepdim=True), the first of equals, by way of amax: on a CPU argmax takes ten times as long."""
    columns = logits.shape[1]
    whole = columns // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    largest = logits[:, :whole].unflatten(1, (columns // _ARGMAX_BLOCK, _ARGMAX_BLOCK)).amax(2)
    if whole < columns:
        largest = torch.cat([largest, logits[:, whole:].amax(1, keepdim=True)], 1)
    start = largest.argmax(1, keepdim=True) * _ARGMAX_BLOCK
    block = (start + torch.arange(_ARGMAX_BLOCK, device=logits.device)).clamp_max_(columns - 1)
    return start + logits.gather(1, block).argmax(1, keepdim=True)
