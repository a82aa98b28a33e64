"""The fused head and loss where a head's rows, the vocabulary, are divided over the ranks of a group.

Each rank has rows of hidden states of its own, any number of them. The ranks gather them chunk by chunk, padded to the longest
rank's with rows of weight 0; each scores all of them on its part of the vocabulary; and small sums over the ranks make the
softmaxes whole. The hidden states' gradient is summed back to their ranks. Nobody holds a whole head that is divided, nor whole rows
of logits. Drafter and teacher need not both be divided: of a head that every rank has, each uses its own part.
"""

from __future__ import annotations

import typing
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from spectitan.objectives.row_passes import LOWEST
from spectitan.types import to_device

if typing.TYPE_CHECKING:
    from spectitan.objectives.fused_linear import Teacher

VOCAB_PARALLEL = ("ce", "kl_div")


def vocab_parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    row_weights: Tensor,
    targets: Tensor,
    teacher: Teacher | None,
    chunk_rows: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """fused_linear_loss, of kl_div with a teacher and of ce without, where a head is divided; all ranks of its mesh call it together.

    The gradient that flows into each rank's total must be the same on all ranks: they are shares of one sum. So is the gradient of
    a head that every rank has.

    Args:
        weight, teacher.weight: at least one is divided by rows over a mesh of one dimension.
        chunk_rows: rows of each rank that are scored at once: on the parts of the vocabulary as many logits as they have on all of it.
        hidden_grad, weight_grad: what needs a gradient.
    """
    part = _Part.of(weight if isinstance(weight, DTensor) else teacher.weight)
    if teacher is not None:
        teacher = _DividedTeacher(teacher.hidden, part.cut(teacher.weight), teacher.rows.cpu().split(chunk_rows))
    (padded_rows,) = largest_in_group([len(hidden)], part.mesh)
    return _VocabParallelLoss.apply(
        hidden, part.cut(weight), row_weights, targets, teacher, part, padded_rows, chunk_rows, hidden_grad, weight_grad
    )


def rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids], a constant; of a divided head on every rank. All ranks of its mesh call it together, with the same ids, int64 [N]."""
    if not isinstance(weight, DTensor):
        return weight.detach().index_select(0, ids)
    part = _Part.of(weight)
    mine, place = part.locate(ids)
    own = part.cut(weight.detach()).index_select(0, place) * mine[:, None]
    dist.all_reduce(own, group=part.group)
    return own


def largest_in_group(numbers: list[int], mesh: DeviceMesh) -> list[int]:
    """The largest of the ranks' numbers, place by place. It goes by the host, which does not wait for the device."""
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX, mesh.get_group())
    return largest.tolist()


class _DividedTeacher(NamedTuple):
    hidden: Tensor  # [M, d]
    weight: Tensor  # [own part of the vocabulary, d]
    rows: tuple[Tensor, ...]  # int64, on the host, of each chunk of own rows


class _Part(NamedTuple):
    """A rank's part of the vocabulary, and what makes its sums whole."""

    mesh: DeviceMesh
    first: int
    size: int
    vocab_size: int

    @staticmethod
    def of(weight: DTensor) -> _Part:
        mesh = weight.device_mesh
        assert mesh.ndim == 1 and weight.placements[0].is_shard(0), f"a head divided by {weight.placements} of {mesh}"
        share = -(-len(weight) // mesh.size())  # rounded up
        first = mesh.get_local_rank() * share
        return _Part(mesh, first, min(share, len(weight) - first), len(weight))

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def cut(self, weight: Tensor) -> Tensor:
        """This rank's rows of a head."""
        return weight.to_local() if isinstance(weight, DTensor) else weight.narrow(0, self.first, self.size)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id is in this part, and where in it; 0 if it is not."""
        mine = (ids >= self.first) & (ids < self.first + self.size)
        return mine, torch.where(mine, ids - self.first, 0)

    def at(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logit of each row's token, int64 [rows]; 0 if it is another rank's: they add up."""
        mine, place = self.locate(ids)
        return torch.where(mine, logits.gather(1, place[:, None])[:, 0], 0)

    def subtract_largest(self, logits: Tensor) -> Tensor:
        """In place; returns the largest of this part, of what is left."""
        of_part = logits.amax(1)
        largest = of_part.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        logits -= largest[:, None]
        return of_part - largest

    def sum(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Columns [rows], summed over the ranks."""
        sums = torch.stack(columns)
        dist.all_reduce(sums, group=self.group)
        return tuple(sums)

    def gather(self, own: Tensor) -> Tensor:
        """[rows, ...] of each rank -> [ranks * rows, ...], the same on all."""
        return DTensor.from_local(own, self.mesh, [Shard(0)], run_check=False).full_tensor()

    def scatter_sum(self, shares: Tensor) -> Tensor:
        """[ranks * rows, ...], a share of a sum on each rank -> [rows, ...], the sum's rows of this rank."""
        return DTensor.from_local(shares, self.mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)]).to_local()


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_weights, targets, teacher, part, padded_rows, chunk_rows, hidden_grad, weight_grad):
        dtype, ranks, rank = torch.promote_types(weight.dtype, torch.float32), part.mesh.size(), part.mesh.get_local_rank()
        own_rows, row_weights = len(hidden), row_weights.to(dtype)
        row_stats = torch.empty(padded_rows, 3, dtype=dtype, device=hidden.device)
        d_hidden = hidden.new_empty(padded_rows, hidden.shape[1]) if hidden_grad else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if weight_grad else None
        padded = [_pad(tensor, padded_rows) for tensor in (hidden, targets, row_weights)]
        chunks = range(0, padded_rows, chunk_rows)
        distinct = None if teacher is None else _DistinctRows(teacher, len(chunks), part)
        for number, start in enumerate(chunks):
            own = slice(start, min(start + chunk_rows, padded_rows))
            gathered, chunk_targets, chunk_weights = (part.gather(tensor[own]) for tensor in padded)
            product = torch.mm(gathered, weight.T)
            if teacher is None:
                stats, logits, scale = _ce(product.to(dtype), chunk_targets, part)
            else:
                p, place = distinct.score(number, own.stop - own.start, dtype)
                stats, logits, scale = _kl_div(product.to(dtype), p, place, part)
            row_stats[own] = stats.chunk(ranks)[rank]
            d_logits, scale = product.copy_(logits), (chunk_weights * scale)[:, None]
            if hidden_grad:
                d_hidden[own] = part.scatter_sum((torch.mm(d_logits, weight) * scale).to(hidden.dtype))
            if weight_grad:
                d_weight += torch.mm(d_logits.T, (gathered * scale).to(weight.dtype))
        row_stats = row_stats[:own_rows].clone()  # no view: callers write into it
        ctx.save_for_backward(d_hidden[:own_rows] if hidden_grad else None, d_weight.to(weight.dtype) if weight_grad else None)
        ctx.mark_non_differentiable(row_stats)
        return row_stats[:, 0] @ row_weights, row_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        return *(None if gradient is None else gradient * d_total for gradient in ctx.saved_tensors), *[None] * 8


def _ce(logits: Tensor, targets: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """row_stats; normaliser * gradient on this part's logits, in their place; 1 / normaliser [rows]. The rows are those of all ranks.

    A row whose target is -1 has none: zeros.
    """
    part.subtract_largest(logits)
    at_target = part.at(logits, targets)
    normaliser, at_target = part.sum(logits.clamp_min_(LOWEST).exp_().sum(1), at_target)
    unnormalised = at_target.exp()
    mine, place = (column[:, None] for column in part.locate(targets))
    logits.scatter_(1, place, torch.where(mine, (unnormalised - normaliser)[:, None], logits.gather(1, place)))
    known = targets >= 0
    row_stats = torch.stack([normaliser.log() - at_target, at_target == 0, unnormalised / normaliser], 1)
    return row_stats * known[:, None], logits, known / normaliser


class _Distributions(NamedTuple):
    """Teacher distributions p of U rows, as row_passes.Distributions, of this part of the vocabulary."""

    unnormalised: Tensor  # [U, part], p * normaliser
    normaliser: Tensor  # [U]
    negative_entropy: Tensor  # [U]
    best: Tensor  # int64 [U], of the whole vocabulary


class _DistinctRows:
    """The teacher's rows of one chunk after another: of all ranks, those that repeat once, padded to the most of a rank's."""

    def __init__(self, teacher: _DividedTeacher, chunks: int, part: _Part):
        self.teacher, self.part = teacher, part
        self.chunks = [torch.unique_consecutive(rows, return_inverse=True) for rows in teacher.rows]
        nothing = torch.empty(0, dtype=torch.int64)
        self.chunks += [(nothing, nothing)] * (chunks - len(self.chunks))  # another rank has more rows
        self.most = largest_in_group([len(rows) for rows, _ in self.chunks], part.mesh) if chunks else []

    def score(self, number: int, rows: int, dtype: torch.dtype) -> tuple[_Distributions, Tensor]:
        """Distributions of a chunk, and int64 [ranks * rows], the place of each of its rows among them."""
        distinct, place = self.chunks[number]
        device, most = self.teacher.hidden.device, max(1, self.most[number])
        hidden = _pad(self.teacher.hidden.index_select(0, to_device(distinct, device)), most)
        place = _pad(place, rows) + self.part.mesh.get_local_rank() * most
        p = _distributions(torch.mm(self.part.gather(hidden), self.teacher.weight.T).to(dtype), self.part)
        return p, self.part.gather(to_device(place, device))


def _distributions(logits: Tensor, part: _Part) -> _Distributions:
    best = logits.argmax(1) + part.first
    # Of equals the first: that of the lowest rank.
    best = torch.where(part.subtract_largest(logits) == 0, best, part.vocab_size)
    dist.all_reduce(best, dist.ReduceOp.MIN, part.group)
    weighted_sum = logits.clamp_min_(LOWEST).exp().mul_(logits).sum(1)
    normaliser, weighted_sum = part.sum(logits.exp_().sum(1), weighted_sum)
    return _Distributions(logits, normaliser, weighted_sum / normaliser - normaliser.log(), best)


def _kl_div(logits: Tensor, p: _Distributions, place: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """As `_ce`, against the distribution at each row's place."""
    unnormalised, teacher_normaliser, negative_entropy, best = (column.index_select(0, place) for column in p)
    part.subtract_largest(logits)
    at_best, mean = part.at(logits, best), (unnormalised * logits).sum(1)
    normaliser, at_best, mean = part.sum(logits.clamp_min_(LOWEST).exp_().sum(1), at_best, mean)
    logits.addcmul_(unnormalised, (normaliser / teacher_normaliser)[:, None], value=-1)
    (difference,) = part.sum(logits.abs().sum(1))
    # sum min(p, q) = 1 - sum |q - p| / 2, because both sum to 1.
    alpha = 1 - difference / (2 * normaliser)
    loss = negative_entropy - mean / teacher_normaliser + normaliser.log()
    return torch.stack([loss, at_best == 0, alpha], 1), logits, 1 / normaliser


def _pad(own: Tensor, rows: int) -> Tensor:
    padded = own.new_zeros(rows, *own.shape[1:])
    padded[: len(own)] = own
    return padded
