"""The row pass (see row_passes.py) of any weighted sum of losses, from their description in token_terms.py.

Written plainly, for torch.compile, which makes a few loops over a block of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spectitan.objectives import token_terms
from spectitan.objectives.row_passes import LOWEST

_OF_ALPHA = ("kl_div", "tv", "nla", "lk_hybrid")  # in the order of token_terms.of_alpha


def mixture(logits: Tensor, targets: Tensor, teacher_logits: Tensor, best: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Leaves the gradient in the logits' place. Returns row_stats; correct and alpha are against the teacher.

    Args:
        logits, teacher_logits: [rows, V].
        targets: int64 [rows, 1], of ce; -1: none.
        best: int64 [rows, 1], argmax of teacher_logits.
        weights: of the losses, by name.
    """
    log_q, log_p = logits.log_softmax(1), teacher_logits.log_softmax(1)
    q, p = (log.clamp_min(LOWEST).exp() for log in (log_q, log_p))
    f, slope_of_tv = token_terms.overlap(p, q)
    alpha = f.sum(1, keepdim=True)
    of_kl, of_tv, loss = token_terms.of_alpha(alpha, *(weights.get(name, 0.0) for name in _OF_ALPHA))
    terms = []  # how many times, f, s
    if weights.keys() & {"kl_div", "lk_hybrid"}:
        terms.append((of_kl, *token_terms.kl_div(p, q, log_p, log_q)))
    if "rkl" in weights:
        terms.append((weights["rkl"], *token_terms.rkl(p, q, log_p, log_q)))
    if "jsd" in weights:
        terms.append((weights["jsd"], *token_terms.jsd(p, q)))
    slopes = [times * s for times, _, s in terms]
    if weights.keys() & {"tv", "nla", "lk_hybrid"}:
        slopes.append(of_tv * slope_of_tv)
    slope = sum(slopes, torch.zeros_like(q))

    known = (targets >= 0).to(q.dtype)
    targets = targets.clamp_min(0)
    of_best, of_target = torch.full_like(alpha, weights.get("ce_argmax", 0.0)), weights.get("ce", 0.0) * known
    at_best, at_target = log_q.gather(1, best), log_q.gather(1, targets)
    loss = loss + sum(times * f.sum(1, keepdim=True) for times, f, _ in terms) - of_best * at_best - of_target * at_target
    correct = at_best == log_q.amax(1, keepdim=True)
    gradient = q * (slope - (q * slope).sum(1, keepdim=True) + of_best + of_target)
    logits.copy_(gradient.scatter_add(1, best, -of_best).scatter_add(1, targets, -of_target))
    return torch.cat([loss, correct, alpha], 1)
