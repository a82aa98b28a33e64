"""The losses in their plain form, over whole [rows, vocabulary] tensors: what the fused ones are tested and timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ce(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against a known token.

    Args:
        logits: [N, V].
        targets: int64 [N].

    Returns:
        loss: [N], -log q(target), in nats, differentiable.
        row_stats: [N, 3], loss, correct (argmax q is the target), alpha (q(target): the chance that the draft's sample is it).
    """
    loss = F.cross_entropy(logits, targets, reduction="none")
    alpha = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    return loss, _stack(loss, logits.argmax(-1) == targets, alpha)


def kl_div(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) to the teacher's distribution p.

    Args:
        logits, teacher_logits: [N, V].

    Returns:
        loss: [N], in nats, differentiable.
        row_stats: [N, 3], loss, correct (argmax q is argmax p), alpha (sum of min(p, q): the expected acceptance of a draft
            sampled from q, Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).
    """
    log_q, log_p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    loss = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    alpha = torch.minimum(log_q, log_p).exp().sum(-1)
    return loss, _stack(loss, logits.argmax(-1) == teacher_logits.argmax(-1), alpha)


def _stack(loss: Tensor, correct: Tensor, alpha: Tensor) -> Tensor:
    return torch.stack([loss, correct.to(loss.dtype), alpha], 1).detach()
