"""Output head and loss in one: no [N, vocabulary] tensor lives, and gradients are made in the forward.

The rows are walked in chunks. A chunk's logits are overwritten by their own gradient, which at once goes into the gradients
of hidden states and head; the backward pass only scales those. All chunks use the same memory: on a CPU, fresh memory of that
size costs more than the arithmetic on it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from spectitan.objectives import row_passes
from spectitan.objectives.row_passes import Distributions
from spectitan.objectives.vocab_parallel import vocab_parallel_ce


class Teacher(NamedTuple):
    """Where target distributions come from: p = softmax(hidden[rows] @ weight.T), computed once for a row that repeats."""

    hidden: Tensor  # [M, d], in the compute dtype
    weight: Tensor  # [V, d]
    rows: Tensor  # int64 [N], ascending; the host plans by them: on a GPU, keep them on the CPU, or it waits for a copy


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
        hidden: [N, w], in the compute dtype. N = 0 gives a total and gradients of 0.
        weight: [V, w], of the same dtype. Frozen, it costs no work on its gradient; under no_grad there is none at all. It, and a
            teacher's, may be divided over the ranks of a mesh (tensor parallelism), which then call this together, each with its own rows.
        row_weights: [N], constants. A row of weight 0 has statistics, and exactly no gradient.
        loss: "ce", against `targets`; or "kl_div", KL(p || q) to the teacher's distribution p.
        targets: int64 [N]; unused by kl_div.
        teacher: of kl_div; constant. Unused by ce.
        chunk_rows: rows of logits alive at once; -1: as many as use the hardware well, in bounded memory.

    Returns:
        total: [], float32 (float64 when computing in float64).
        row_stats: [N, 3], of the same dtype, constants: loss in nats; correct, 1 if no logit is above that of the target
            (kl_div: of argmax p, the first of equals), so that a tie counts as right; alpha, q(target) or sum min(p, q),
            the expected acceptance of a token drawn from q (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).
    """
    assert loss in ("ce", "kl_div"), loss
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
    wanted = torch.is_grad_enabled()  # asked here, because inside the Function needs_input_grad stays True under no_grad
    teacher = teacher if loss == "kl_div" else None
    if isinstance(weight, DTensor) and loss == "ce":
        rows = _automatic_chunk_rows(weight.to_local()) if chunk_rows == -1 else chunk_rows
        return vocab_parallel_ce(hidden, weight, row_weights, targets, rows, wanted and hidden.requires_grad)
    weight, teacher = _whole(weight), teacher and teacher._replace(weight=_whole(teacher.weight))
    if chunk_rows == -1:
        chunk_rows = _automatic_chunk_rows(weight)
    return _FusedLinearLoss.apply(
        hidden, weight, row_weights, targets, teacher, chunk_rows, wanted and hidden.requires_grad, wanted and weight.requires_grad
    )


def _whole(weight: Tensor) -> Tensor:
    """A head that is divided over ranks, gathered: each then scores its own rows, which is no more work, and moves less than their logits."""
    return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


def _automatic_chunk_rows(weight: Tensor) -> int:
    """Each chunk reads and writes the head's whole gradient, so that many rows are needed before arithmetic outweighs that."""
    # CPU: measured by benchmarks/fused_loss.py. GPU: arithmetic per byte of memory is some ten times as much; not measured.
    most_rows, most_bytes = (512, 32 << 20) if weight.device.type == "cpu" else (4096, 1 << 30)
    return max(8, min(most_rows, most_bytes // (len(weight) * weight.element_size()) // 8 * 8))


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_weights, targets, teacher, chunk_rows, hidden_grad, weight_grad):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        row_weights = row_weights.to(dtype)
        row_stats = torch.empty(len(hidden), 3, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_grad else None
        d_weight = _WideSum(weight, dtype) if weight_grad else None
        d_logits = None
        chunks = _Chunks(weight, targets, teacher, min(chunk_rows, len(hidden)), dtype)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            row_stats[rows], d_logits, scale = chunks.score(hidden[rows], rows)
            scale *= row_weights[rows, None]
            if hidden_grad:
                torch.mm(d_logits, weight, out=d_hidden[rows]).mul_(scale)
            if weight_grad:
                d_weight.add_product(d_logits.T, (hidden[rows] * scale).to(weight.dtype))
        del chunks, d_logits  # before the next large tensor is made
        ctx.save_for_backward(d_hidden, d_weight.total.to(weight.dtype) if weight_grad else None)
        ctx.mark_non_differentiable(row_stats)
        return row_stats[:, 0] @ row_weights, row_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        return *(None if gradient is None else gradient * d_total for gradient in ctx.saved_tensors), *[None] * 6


class _Chunks:
    """The logits of one chunk after another, in the same memory, and what becomes of them."""

    def __init__(self, weight: Tensor, targets: Tensor, teacher: Teacher | None, chunk_rows: int, dtype: torch.dtype):
        self.weight, self.targets, self.teacher = weight, targets[:, None], teacher
        self.logits = weight.new_empty(chunk_rows, len(weight))
        # Row passes go by blocks of a million logits, which stay in a CPU's cache. A GPU takes the chunk at once.
        self.block_rows = max(1, min(chunk_rows, (1 << 20) // len(weight) if weight.device.type == "cpu" else chunk_rows))
        self.wide = self._scratch(self.block_rows, dtype) if weight.dtype != dtype else None
        if teacher is not None:
            self.teacher_rows = teacher.rows.cpu()
            self.teacher_logits = self._scratch(chunk_rows, dtype)
            self.p, self.scratch = self._scratch(self.block_rows, dtype), self._scratch(self.block_rows, dtype)

    def _scratch(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.logits.new_empty(rows, len(self.weight), dtype=dtype)

    def score(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """row_stats of a chunk; d_logits [rows, V] and scale [rows, 1], whose product is the gradient on its logits."""
        if self.teacher is not None:
            distributions, place = self._distributions(self.teacher_rows[rows])
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
        targets = self.targets[rows]
        results = []
        for block in self._blocks(len(logits)):
            wide = logits[block] if self.wide is None else self.wide[: block.stop - block.start].copy_(logits[block])
            if self.teacher is None:
                results.append(row_passes.ce(wide, targets[block]))
            else:
                p = distributions.select(place[block], self.p[: len(wide)])
                results.append(row_passes.kl_div(wide, p, self.scratch[: len(wide)]))
            if self.wide is not None:
                logits[block] = wide
        row_stats, scale = (torch.cat(parts) for parts in zip(*results))
        return row_stats, logits, scale

    def _distributions(self, teacher_rows: Tensor) -> tuple[Distributions, Tensor]:
        """Of the distinct rows among teacher_rows; and the place of each row among them."""
        distinct, place = torch.unique_consecutive(teacher_rows, return_inverse=True)
        hidden = self.teacher.hidden[distinct.to(self.logits.device, non_blocking=True)]
        wide = self.teacher_logits[: len(hidden)]
        logits = torch.mm(hidden, self.teacher.weight.T, out=wide if self.wide is None else self.logits[: len(hidden)])
        if self.wide is not None:
            wide.copy_(logits)
        blocks = [row_passes.distributions(wide[block], self.scratch[: block.stop - block.start]) for block in self._blocks(len(wide))]
        columns = (torch.cat(parts) for parts in list(zip(*blocks))[1:])
        return Distributions(wide, *columns), place.to(self.logits.device, non_blocking=True)

    def _blocks(self, rows: int) -> list[slice]:
        return [slice(start, min(start + self.block_rows, rows)) for start in range(0, rows, self.block_rows)]


class _WideSum:
    """A sum of matrix products, of the shape of `like`, in a dtype that may be wider than the products'.

    A narrower product goes by blocks of rows, which are still in a CPU's cache when they are widened and added. (PyTorch's sum
    of two dtypes would make a wide copy in fresh memory each time, which takes as long as half of the product.)
    """

    _BLOCK_BYTES = 1 << 20

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.total = torch.zeros_like(like, dtype=dtype)
        rows = max(1, self._BLOCK_BYTES // (like.element_size() * like.shape[1])) if like.device.type == "cpu" else len(like)
        self.product = like.new_empty(min(rows, len(like)), like.shape[1]) if like.dtype != dtype else None
        self.wide = None if self.product is None else self.product.to(dtype)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds left [V, rows] @ right [rows, w]."""
        if self.product is None:
            self.total.addmm_(left, right)
            return
        for total, rows in zip(self.total.split(len(self.product)), left.split(len(self.product))):
            product = torch.mm(rows, right, out=self.product[: len(rows)])
            total.add_(self.wide[: len(rows)].copy_(product))
