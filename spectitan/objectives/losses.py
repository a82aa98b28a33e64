"""The losses in their plain form, over whole [rows, vocabulary] tensors: what the fused ones are tested and timed against.

p is the teacher's distribution, q the drafter's, alpha = sum of min(p, q): the expected acceptance of a token drafted from q
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). nla and lk_hybrid: Samarin et al. 2026, https://arxiv.org/abs/2602.23881.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spectitan.config.loss_mixture import loss_weights

# log q, log p [rows, V] and alpha [rows] -> [rows], in nats.
_AGAINST_TEACHER = {
    "kl_div": lambda log_q, log_p, alpha: _kl(log_p, log_q),
    "rkl": lambda log_q, log_p, alpha: _kl(log_q, log_p),
    "jsd": lambda log_q, log_p, alpha: _jsd(log_q, log_p),
    "tv": lambda log_q, log_p, alpha: 1 - alpha,  # the total variation distance: the chance that a draft is refused
    "nla": lambda log_q, log_p, alpha: -alpha.clamp_min(1e-5).log(),
    "lk_hybrid": lambda log_q, log_p, alpha: _lk_hybrid(log_q, log_p, alpha),
    "ce_argmax": lambda log_q, log_p, alpha: F.nll_loss(log_q, log_p.argmax(-1), reduction="none"),
}


def mixture(loss: str, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `objective.loss` names.

    Args:
        logits, teacher_logits: [rows, V]; the teacher's may be None for ce.
        targets: int64 [rows], of ce; a row whose target is -1 has none, and no ce.

    Returns:
        row_losses: [rows], in nats, differentiable.
        row_stats: [rows, 3]: loss; correct, argmax q is argmax p; alpha. Of ce alone: argmax q is the target; q(target).
    """
    weights, log_q = loss_weights(loss), logits.log_softmax(-1)
    row_losses = torch.zeros_like(log_q[:, 0])
    if "ce" in weights:
        row_losses = row_losses + weights["ce"] * F.nll_loss(log_q, targets, reduction="none", ignore_index=-1)
    if weights.keys() == {"ce"}:
        alpha = log_q.gather(1, targets.clamp_min(0)[:, None])[:, 0].exp() * (targets >= 0)
        return row_losses, _stack(row_losses, logits.argmax(-1) == targets, alpha)
    log_p = teacher_logits.log_softmax(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not weights.keys().isdisjoint({"tv", "nla", "lk_hybrid"})):
        alpha = torch.minimum(log_q, log_p).exp().sum(-1)
    for name in weights.keys() - {"ce"}:
        row_losses = row_losses + weights[name] * _AGAINST_TEACHER[name](log_q, log_p, alpha)
    return row_losses, _stack(row_losses, logits.argmax(-1) == teacher_logits.argmax(-1), alpha)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _lk_hybrid(log_q: Tensor, log_p: Tensor, alpha: Tensor) -> Tensor:
    part = torch.exp(-3 * alpha.detach())
    return part * _kl(log_p, log_q) + (1 - part) * (1 - alpha)


def _stack(loss: Tensor, correct: Tensor, alpha: Tensor) -> Tensor:
    return torch.stack([loss, correct.to(loss.dtype), alpha], 1).detach()
