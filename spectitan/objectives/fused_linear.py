"""Output head and loss in one: no [N, vocabulary] tensor lives, and gradients are made in the forward.

The rows are walked in chunks. A chunk's logits are overwritten by their own gradient, which at once goes into the gradients
of hidden states and head; the backward pass only scales those. All chunks, and on a CPU all steps, use the same memory: there,
fresh memory of that size costs more than the arithmetic on it.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from spectitan.config.loss_mixture import loss_weights, needs_teacher
from spectitan.objectives.block_passes import RehearsedPass, block_pass
from spectitan.objectives.kept_memory import kept_memory
from spectitan.objectives.vocab_parallel import VOCAB_PARALLEL, vocab_parallel_loss
from spectitan.types import to_device


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
        weight: [V, w], of the same dtype, or a wider master: it is cast here, and its gradient, summed in float32, is not rounded.
            Frozen, it costs no work on its gradient; under no_grad there is none at all. It, and a teacher's, may be divided over the
            ranks of a mesh (tensor parallelism), which then call this together, each with its own rows.
        row_weights: [N], constants. A row of weight 0 has statistics, and exactly no gradient.
        loss: as `objective.loss`: a name in objectives/losses.py, or weights of several.
        targets: int64 [N], of ce. A row whose target is -1 has none, and no ce.
        teacher: p, of all other losses; constant.
        chunk_rows: rows of logits alive at once; -1: as many as use the hardware well, in bounded memory.

    Returns:
        total: [], float32 (float64 when computing in float64).
        row_stats: [N, 3], of the same dtype, constants: loss in nats; correct, 1 if no logit is above that of argmax p, the
            first of equals (without a teacher: the target), so that a tie counts as right; alpha, sum min(p, q) (without a teacher:
            q(target)), the expected acceptance of a token drawn from q (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).

    The backward hands the gradients on, which may be as large as the head, and cannot be run twice.
    """
    assert torch.promote_types(hidden.dtype, weight.dtype) == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
    wanted = torch.is_grad_enabled()  # asked here, because inside the Function needs_input_grad stays True under no_grad
    weights, teacher = loss_weights(loss), teacher if needs_teacher(loss) else None
    assert needs_teacher(loss) == (teacher is not None), f"{loss} without a teacher"
    if len(weights) == 1 and loss not in weights:  # one loss, with a weight
        ((loss, times),) = weights.items()
        total, row_stats = fused_linear_loss(
            hidden, weight, times * row_weights, loss=loss, targets=targets, teacher=teacher, chunk_rows=chunk_rows
        )
        return total, torch.cat([times * row_stats[:, :1], row_stats[:, 1:]], 1)
    wanted = wanted and hidden.requires_grad, wanted and weight.requires_grad
    if chunk_rows == -1:
        chunk_rows = _automatic_chunk_rows(weight, hidden.dtype)
    is_divided = isinstance(weight, DTensor) or (teacher is not None and isinstance(teacher.weight, DTensor))
    if is_divided and loss in VOCAB_PARALLEL:
        return vocab_parallel_loss(hidden, weight.to(hidden.dtype), row_weights, targets, teacher, chunk_rows, *wanted)
    weight, teacher = _whole(weight), teacher and teacher._replace(weight=_whole(teacher.weight))
    return _FusedLinearLoss.apply(hidden, weight, row_weights, weights, targets, teacher, chunk_rows, *wanted)


def _whole(weight: Tensor) -> Tensor:
    """A head that is divided over ranks, gathered: each then scores its own rows."""
    return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


def _automatic_chunk_rows(weight: Tensor, dtype: torch.dtype) -> int:
    """Each chunk reads and writes the head's whole gradient, so that many rows are needed before arithmetic outweighs that."""
    # CPU: measured by benchmarks/fused_loss.py. GPU: arithmetic per byte of memory is some ten times as much; not measured.
    most_rows, most_bytes = (512, 32 << 20) if weight.device.type == "cpu" else (4096, 1 << 30)
    return max(8, min(most_rows, most_bytes // (len(weight) * dtype.itemsize) // 8 * 8))


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_weights, weights, targets, teacher, chunk_rows, hidden_grad, weight_grad):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        row_weights, master_dtype, weight = row_weights.to(dtype), weight.dtype, weight.to(hidden.dtype)
        row_stats = torch.empty(len(hidden), 3, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_grad else None
        d_weight = _WideSum(weight, dtype) if weight_grad else None
        d_logits = None
        chunks = _Chunks(weight, weights, targets, teacher, len(hidden), chunk_rows)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            row_stats[rows], d_logits, factors = chunks.score(hidden[rows], rows)
            scale = factors * row_weights[rows, None]
            if hidden_grad:
                torch.mm(d_logits, weight, out=d_hidden[rows]).mul_(scale)
            if weight_grad:
                d_weight.add_product(d_logits.T, (hidden[rows] * scale).to(weight.dtype))
        ctx.gradients = d_hidden, d_weight.total.to(master_dtype) if weight_grad else None
        ctx.mark_non_differentiable(row_stats)
        return row_stats[:, 0] @ row_weights, row_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        assert ctx.gradients is not None, "a second backward: the first has handed the gradients on"
        gradients, ctx.gradients = ctx.gradients, None  # held here too, autograd would copy them
        return *(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), *[None] * 7


class _Chunks:
    """The logits of one chunk after another, in the same memory, and what becomes of them."""

    def __init__(self, weight: Tensor, weights: Mapping[str, float], targets: Tensor, teacher: Teacher | None, rows: int, chunk_rows: int):
        self.weight, self.targets, self.teacher = weight, targets[:, None], teacher
        self.row_pass = _row_pass(weight)(weights, rows, chunk_rows, weight)
        self.logits = kept_memory("logits", min(rows, chunk_rows), weight)
        if teacher is not None:
            self.teacher_rows = teacher.rows.cpu()
            self.teacher_logits = self.logits if self.row_pass.copies_teacher else kept_memory("teacher", len(self.logits), weight)

    def score(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """row_stats of a chunk; d_logits [rows, V] and factors [rows, 1], whose product is the gradient on its logits."""
        place = None if self.teacher is None else self._read_teachers(self.teacher_rows[rows])
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
        row_stats, factors = self.row_pass.score(logits, self.targets[rows], place)
        return row_stats, logits, factors

    def _read_teachers(self, teacher_rows: Tensor) -> Tensor:
        """The distinct rows among teacher_rows; returns the place of each row among them."""
        distinct, place = torch.unique_consecutive(teacher_rows, return_inverse=True)
        hidden = self.teacher.hidden[to_device(distinct, self.logits.device)]
        self.row_pass.read_teacher(torch.mm(hidden, self.teacher.weight.T, out=self.teacher_logits[: len(hidden)]))
        return to_device(place, self.logits.device)


def _row_pass(weight: Tensor) -> Callable:
    """What scores the logits of a head. On the meta device a plan is made, for a GPU."""
    if weight.is_meta and weight.dtype != torch.float64:
        return RehearsedPass
    if weight.is_cuda and weight.dtype != torch.float64 and importlib.util.find_spec("triton"):
        from spectitan.objectives.triton_pass import TritonPass

        return TritonPass
    return block_pass


class _WideSum:
    """A sum of matrix products, of the shape of `like`, in a dtype that may be wider than the products'.

    A narrower product goes by blocks of rows, which are still in a CPU's cache when they are widened and added. (PyTorch's sum
    of two dtypes would make a wide copy in fresh memory each time, which takes as long as half of the product.) On a GPU the blocks are
    large: there they only bound the product's memory.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.total = torch.zeros_like(like, dtype=dtype)
        block_bytes = 1 << 20 if like.device.type == "cpu" else 1 << 28
        rows = max(1, block_bytes // (like.element_size() * like.shape[1]))
        self.product = like.new_empty(min(rows, len(like)), like.shape[1]) if like.dtype != dtype else None
        self.wide = self.product.to(dtype) if self.product is not None and like.device.type == "cpu" else None  # a GPU widens as it adds

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds left [V, rows] @ right [rows, w]."""
        if self.product is None:
            self.total.addmm_(left, right)
            return
        for total, rows in zip(self.total.split(len(self.product)), left.split(len(self.product))):
            product = torch.mm(rows, right, out=self.product[: len(rows)])
            total.add_(product if self.wide is None else self.wide[: len(rows)].copy_(product))
