"""Output head and loss in one: no [N, vocabulary] tensor lives, and gradients are made in the forward.

The rows are walked in chunks. A chunk's logits are overwritten by their own gradient, which at once goes into the gradients
of hidden states and head; the backward pass only scales those. All chunks use the same buffers: on a CPU, fresh memory of
that size costs more than the arithmetic on it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 16 << 20
_ARGMAX_BLOCK = 256


class Teacher(NamedTuple):
    """Where the target distributions come from: p = softmax(hidden[rows] @ weight.T), computed once per distinct row of a chunk."""

    hidden: Tensor  # [M, d]
    weight: Tensor  # [V, d]
    rows: Tensor  # int64 [N], ascending; the host plans by them, so on a GPU keep them on the CPU or it waits for a copy


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    row_weights: Tensor,
    *,
    loss: str,
    targets: Tensor,
    teacher: Teacher | None = None,
    chunk_rows: int = -1,
) -> tuple[Tensor, Tensor]:
    """sum_n row_weights[n] * loss(hidden[n] @ weight.T), differentiable in hidden and weight.

    Args:
        hidden: [N, w], in the compute dtype. N = 0 gives a total of 0 and gradients of 0.
        weight: [V, w], in the same dtype. Where it needs no gradient, none is computed.
        row_weights: [N], without gradient. A row of weight 0 gives no gradient.
        loss: "ce" against `targets`, or "kl_div", KL(p || q) to the teacher's distribution p.
        targets: int64 [N]; unused by kl_div.
        teacher: of kl_div; gets no gradient.
        chunk_rows: rows of logits alive at once; -1: as many as keep a chunk near 16 MB.

    Returns:
        total: [], float32 (float64 when computing in float64).
        row_stats: [N, 3], same dtype, without gradient: loss in nats; correct, 1 where no logit exceeds that of the target
            (kl_div: of argmax p), so a tie counts as right; alpha, q(target) or sum min(p, q).
    """
    assert loss in ("ce", "kl_div"), loss
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    # Inside the Function needs_input_grad stays True under no_grad.
    wanted = torch.is_grad_enabled()
    if chunk_rows == -1:
        chunk_rows = max(16, _CHUNK_BYTES // (len(weight) * hidden.element_size()) // 8 * 8)
    if loss == "ce":
        teacher = None
    return _FusedLinearLoss.apply(
        hidden, weight, row_weights, targets, teacher, chunk_rows, wanted and hidden.requires_grad, wanted and weight.requires_grad
    )


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_weights, targets, teacher, chunk_rows, hidden_grad, weight_grad):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        row_weights = row_weights.to(dtype)
        row_stats = torch.empty(len(hidden), 3, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_grad else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if weight_grad else None
        chunks = _Chunks(min(chunk_rows, len(hidden)), weight, dtype, teacher)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits, row_stats[rows] = chunks.loss(hidden[rows], targets[rows], rows)
            if not (hidden_grad or weight_grad):
                continue
            d_logits = chunks.weigh(logits, row_weights[rows])
            if hidden_grad:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if weight_grad:
                chunks.add_product(d_weight, d_logits.T, hidden[rows])
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(row_stats)
        return (row_stats[:, 0] * row_weights).sum(), row_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total,
            None if d_weight is None else d_weight * d_total,
            *[None] * 6,
        )


class _Chunks:
    """The buffers of one call, and what is done in them."""

    def __init__(self, chunk_rows: int, weight: Tensor, dtype: torch.dtype, teacher: Teacher | None):
        self.weight, self.teacher, self.dtype = weight, teacher, dtype
        self.product = weight.new_empty(chunk_rows, len(weight))
        # Statistics need float32: logits of a shorter type are widened into a second buffer.
        self.logits = self.product if weight.dtype == dtype else torch.empty_like(self.product, dtype=dtype)
        if teacher is not None:
            self.teacher_rows = teacher.rows.cpu()
            self.teacher_product, self.p = torch.empty_like(self.product), torch.empty_like(self.logits)
            self.teacher_p = self.teacher_product if weight.dtype == dtype else torch.empty_like(self.p)
        self.weight_product = None

    def _matmul(self, hidden: Tensor, weight: Tensor, product: Tensor, logits: Tensor) -> Tensor:
        torch.mm(hidden, weight.T, out=product[: len(hidden)])
        if product is not logits:
            logits[: len(hidden)].copy_(product[: len(hidden)])
        return logits[: len(hidden)]

    def loss(self, hidden: Tensor, targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The gradient on a chunk's logits, q - onehot or q - p, and its row_stats."""
        if self.teacher is None:
            logits = self._matmul(hidden, self.weight, self.product, self.logits)
            return logits, _ce(logits, targets)
        distinct, place = torch.unique_consecutive(self.teacher_rows[rows], return_inverse=True)
        distinct, place = (index.to(hidden.device, non_blocking=True) for index in (distinct, place))
        p = self._matmul(self.teacher.hidden[distinct], self.teacher.weight, self.teacher_product, self.teacher_p)
        best = _argmax(p)
        log_p = torch.log_softmax(p, 1, out=self.p[: len(p)])
        torch.exp(log_p, out=p)
        negative_entropy = _row_dot(p, log_p)
        if len(p) != len(hidden):
            p = torch.index_select(p, 0, place, out=self.p[: len(hidden)])
        logits = self._matmul(hidden, self.weight, self.product, self.logits)
        return logits, _kl_div(logits, p, negative_entropy[place], best[place])

    def weigh(self, d_logits: Tensor, row_weights: Tensor) -> Tensor:
        """d_logits times row_weights, in the compute dtype."""
        return torch.mul(d_logits, row_weights[:, None], out=self.product[: len(d_logits)])

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, with a total that may be wider."""
        if total.dtype == right.dtype:
            total.addmm_(left, right)
            return
        if self.weight_product is None:
            self.weight_product = torch.empty_like(self.weight)
        total.add_(torch.mm(left, right, out=self.weight_product))


def _ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Overwrites logits by q - onehot; returns row_stats."""
    log_q = torch.log_softmax(logits, 1, out=logits)
    target = log_q.gather(1, targets[:, None])
    correct = target >= log_q.amax(1, keepdim=True)
    q = log_q.exp_()
    q.scatter_add_(1, targets[:, None], -torch.ones_like(target))
    return torch.cat([-target, correct.to(target.dtype), target.exp()], 1)


def _kl_div(logits: Tensor, p: Tensor, negative_entropy: Tensor, best: Tensor) -> Tensor:
    """Overwrites logits by q - p; returns row_stats."""
    log_q = torch.log_softmax(logits, 1, out=logits)
    loss = negative_entropy - _row_dot(p, log_q)
    correct = log_q.gather(1, best[:, None])[:, 0] >= log_q.amax(1)
    difference = log_q.exp_().sub_(p)
    alpha = 1 - torch.linalg.vector_norm(difference, 1, 1) / 2  # sum min(p, q), for both sum to 1
    return torch.stack([loss, correct.to(loss.dtype), alpha], 1)


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """[rows, V], [rows, V] -> [rows], without a product of that size in between."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]


def _argmax(logits: Tensor) -> Tensor:
    """argmax(1), the first of equals; by blocks, because amax is many times faster than argmax on a CPU."""
    rows, columns = logits.shape
    whole = columns // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    blocks = logits[:, :whole].unflatten(1, (-1, _ARGMAX_BLOCK)).amax(2)
    if whole < columns:
        blocks = torch.cat([blocks, logits[:, whole:].amax(1, keepdim=True)], 1)
    first = blocks.argmax(1, keepdim=True) * _ARGMAX_BLOCK
    inside = (first + torch.arange(_ARGMAX_BLOCK, device=logits.device)).clamp_max(columns - 1)
    return (first + logits.gather(1, inside).argmax(1, keepdim=True))[:, 0]
