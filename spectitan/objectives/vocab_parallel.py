"""The fused head and cross-entropy where the head's rows, the vocabulary, are divided over the ranks of a group.

Each rank has rows of hidden states of its own, any number of them. The ranks gather them chunk by chunk, padded to the longest
rank's with rows of weight 0; each scores all of them on its part of the vocabulary; and two small sums make the softmax whole. The
hidden states' gradient is summed back to their ranks, the head's is complete where it is made.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

_LOWEST = -50.0  # as in row_passes.py


def vocab_parallel_ce(
    hidden: Tensor, weight: DTensor, row_weights: Tensor, targets: Tensor, chunk_rows: int, hidden_grad: bool
) -> tuple[Tensor, Tensor]:
    """fused_linear_loss with loss = "ce" and a head that is divided by rows over a mesh of one dimension; all its ranks call it together.

    The gradient that flows into each rank's total must be the same on all ranks: they are shares of one sum.

    Args:
        chunk_rows: rows of all ranks that are scored at once.
        hidden_grad: hidden needs a gradient. The head's is made exactly if it requires one.
    """
    mesh = weight.device_mesh
    assert mesh.ndim == 1 and weight.placements[0].is_shard(0), f"a head divided by {weight.placements} of {mesh}"
    first = mesh.get_local_rank() * -(-len(weight) // mesh.size())  # shares are rounded up
    padded_rows, rows = largest_in_group(len(hidden), mesh.get_group()), max(1, chunk_rows // mesh.size())
    return _VocabParallelCE.apply(
        hidden, weight.to_local(), row_weights, targets, first, padded_rows, rows, mesh, hidden_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )  # fmt: skip


def largest_in_group(number: int, group: dist.ProcessGroup) -> int:
    """The largest of the ranks' numbers. It goes by the host, which does not wait for the device."""
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return int(largest)


class _VocabParallelCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_weights, targets, first, padded_rows, chunk_rows, mesh, hidden_grad, weight_grad):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        own_rows, group = len(hidden), mesh.get_group()
        row_weights = row_weights.to(dtype)
        row_stats = torch.empty(padded_rows, 3, dtype=dtype, device=hidden.device)
        d_hidden = hidden.new_empty(padded_rows, hidden.shape[1]) if hidden_grad else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if weight_grad else None
        padded = [_pad(tensor, padded_rows) for tensor in (hidden, targets, row_weights)]
        for start in range(0, padded_rows, chunk_rows):
            own = slice(start, min(start + chunk_rows, padded_rows))
            gathered, chunk_targets, chunk_weights = (_gather(tensor[own], mesh) for tensor in padded)
            stats, d_logits, normaliser = _score(gathered, weight, chunk_targets - first, dtype, group)
            row_stats[own] = stats.chunk(mesh.size())[mesh.get_local_rank()]
            scale = (chunk_weights / normaliser)[:, None]
            if hidden_grad:
                d_hidden[own] = _scatter_sum((torch.mm(d_logits, weight) * scale).to(hidden.dtype), mesh)
            if weight_grad:
                d_weight += torch.mm(d_logits.T, (gathered * scale).to(weight.dtype))
        row_stats = row_stats[:own_rows]
        ctx.save_for_backward(d_hidden[:own_rows] if hidden_grad else None, d_weight.to(weight.dtype) if weight_grad else None)
        ctx.mark_non_differentiable(row_stats)
        return row_stats[:, 0] @ row_weights, row_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        return *(None if gradient is None else gradient * d_total for gradient in ctx.saved_tensors), *[None] * 8


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, group) -> tuple[Tensor, Tensor, Tensor]:
    """row_stats of the rows of all ranks; normaliser * gradient on this rank's logits, in the compute dtype; normaliser.

    Args:
        targets: int64 [rows], counted from this rank's first token; those of other ranks lie outside.
    """
    product = torch.mm(hidden, weight.T)
    logits = product.to(dtype)
    largest = logits.amax(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    logits -= largest[:, None]
    rows = torch.arange(len(logits), device=logits.device)
    mine = (targets >= 0) & (targets < logits.shape[1])
    place = torch.where(mine, targets, 0)
    sums = logits.new_zeros(2, len(logits))
    sums[1] = torch.where(mine, logits[rows, place], 0)
    logits.clamp_min_(_LOWEST).exp_()
    sums[0] = logits.sum(1)
    dist.all_reduce(sums, group=group)
    normaliser, target = sums
    unnormalised = target.exp()
    logits[rows, place] = torch.where(mine, unnormalised - normaliser, logits[rows, place])
    row_stats = torch.stack([normaliser.log() - target, (target == 0).to(dtype), unnormalised / normaliser], 1)
    return row_stats, product.copy_(logits), normaliser


def _pad(own: Tensor, rows: int) -> Tensor:
    padded = own.new_zeros(rows, *own.shape[1:])
    padded[: len(own)] = own
    return padded


def _gather(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """[rows, ...] of each rank -> [ranks * rows, ...], the same on all."""
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False).full_tensor()


def _scatter_sum(shares: Tensor, mesh: DeviceMesh) -> Tensor:
    """[ranks * rows, ...], a share of a sum on each rank -> [rows, ...], the sum's rows of this rank."""
    return DTensor.from_local(shares, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)]).to_local()
