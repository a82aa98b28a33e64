"""The row pass (see row_passes.py) of any weighted sum of losses on a GPU: one kernel, one program a row, which walks over it three times.

It computes in float32. Nothing is widened or gathered in memory: a program reads its teacher's row where that is.
"""

from collections.abc import Callable, Mapping
from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectitan.config.loss_mixture import LOSSES
from spectitan.objectives import row_passes, token_terms

_LOWEST = tl.constexpr(row_passes.LOWEST)


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


def _jit(function: Callable):
    """A term of PyTorch's as one of Triton's, whose interpreter wants its language among the globals."""
    names = {"exp": _exp, "log": _log, "tl": tl, "__name__": function.__module__}
    return triton.jit(FunctionType(function.__code__, names, function.__name__))


_kl_div, _rkl, _jsd = _jit(token_terms.kl_div), _jit(token_terms.rkl), _jit(token_terms.jsd)
_overlap, _of_alpha = _jit(token_terms.overlap), _jit(token_terms.of_alpha)


class TritonPass:
    """As BlockPass, of a whole chunk at once."""

    copies_teacher = False

    def __init__(self, weights: Mapping[str, float], rows: int, chunk_rows: int, head: Tensor):
        self.weights, self.teacher_logits = {name: float(weights.get(name, 0)) for name in LOSSES}, None

    def read_teacher(self, logits: Tensor) -> None:
        self.teacher_logits = logits

    def score(self, logits: Tensor, targets: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, vocabulary = logits.shape
        row_stats = logits.new_empty(rows, 3, dtype=torch.float32)
        block = min(triton.next_power_of_2(vocabulary), 4096)  # not measured, as the number of warps
        _score_row[(rows,)](logits, targets, self.teacher_logits, place, row_stats, vocabulary, block, **self.weights, num_warps=8)
        return row_stats, row_stats.new_ones(rows, 1)


@triton.jit
def _score_row(
    logits, targets, teacher_logits, place, row_stats, vocabulary: tl.constexpr, block: tl.constexpr,
    ce: tl.constexpr, ce_argmax: tl.constexpr, kl_div: tl.constexpr, rkl: tl.constexpr, jsd: tl.constexpr,
    tv: tl.constexpr, nla: tl.constexpr, lk_hybrid: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    largest, log_total = _largest_and_total(logits, vocabulary, block)
    target = tl.load(targets + row)
    known = target >= 0
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32) - largest
    of_target = known * ce
    loss = of_target * (log_total - at_target)
    if teacher_logits is None:
        correct, alpha, mean_slope = known & (at_target == 0), known * tl.exp(at_target - log_total), 0.0
    else:  # sums of the terms, and the teacher's likeliest token
        teacher_logits += tl.load(place + row) * vocabulary
        teacher_largest, teacher_log_total = _largest_and_total(teacher_logits, vocabulary, block)
        best = vocabulary
        alpha, sum_kl, sum_rkl, sum_jsd, mean_tv, mean_kl, mean_rkl, mean_jsd = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for start in range(0, vocabulary, block):
            columns = start + tl.arange(0, block)
            there = columns < vocabulary
            q, log_q = _probabilities(logits, columns, vocabulary, largest, log_total)
            p, log_p = _probabilities(teacher_logits, columns, vocabulary, teacher_largest, teacher_log_total)
            q, p = tl.where(there, q, 1e-30), tl.where(there, p, 1e-30)
            is_best = there & (_load(teacher_logits, columns, vocabulary) == teacher_largest)
            best = tl.minimum(best, tl.min(tl.where(is_best, columns, vocabulary)))
            f, s = _overlap(p, q)
            alpha += tl.sum(f)
            mean_tv += tl.sum(q * s)
            if kl_div + lk_hybrid > 0:
                f, s = _kl_div(p, q, log_p, log_q)
                sum_kl += tl.sum(f)
                mean_kl += tl.sum(q * s)
            if rkl > 0:
                f, s = _rkl(p, q, log_p, log_q)
                sum_rkl += tl.sum(f)
                mean_rkl += tl.sum(q * s)
            if jsd > 0:
                f, s = _jsd(p, q)
                sum_jsd += tl.sum(f)
                mean_jsd += tl.sum(q * s)
        of_kl, of_tv, more = _of_alpha(alpha, kl_div, tv, nla, lk_hybrid)
        best = tl.minimum(best, vocabulary - 1)  # of a row that is not finite
        at_best = tl.load(logits + best).to(tl.float32) - largest
        correct = at_best == 0
        loss += more + of_kl * sum_kl + rkl * sum_rkl + jsd * sum_jsd + ce_argmax * (log_total - at_best)
        mean_slope = of_tv * mean_tv + of_kl * mean_kl + rkl * mean_rkl + jsd * mean_jsd
    row_stats += row * 3
    tl.store(row_stats, loss)
    tl.store(row_stats + 1, correct.to(tl.float32))
    tl.store(row_stats + 2, alpha)

    tl.debug_barrier()  # no thread may still have to read a logit that another one overwrites
    for start in range(0, vocabulary, block):  # the gradient
        columns = start + tl.arange(0, block)
        q, log_q = _probabilities(logits, columns, vocabulary, largest, log_total)
        slope = tl.zeros_like(q)
        of_tokens = tl.where(columns == target, of_target, 0.0)
        if teacher_logits is not None:
            p, log_p = _probabilities(teacher_logits, columns, vocabulary, teacher_largest, teacher_log_total)
            of_tokens += tl.where(columns == best, ce_argmax, 0.0)
            if tv + nla + lk_hybrid > 0:
                f, s = _overlap(p, q)
                slope += of_tv * s
            if kl_div + lk_hybrid > 0:
                f, s = _kl_div(p, q, log_p, log_q)
                slope += of_kl * s
            if rkl > 0:
                f, s = _rkl(p, q, log_p, log_q)
                slope += rkl * s
            if jsd > 0:
                f, s = _jsd(p, q)
                slope += jsd * s
        tl.store(logits + columns, q * (slope - mean_slope + of_target + ce_argmax) - of_tokens, columns < vocabulary)


@triton.jit
def _largest_and_total(row, vocabulary: tl.constexpr, block: tl.constexpr):
    """The largest of a row of logits, and the logarithm of the sum of exp(logit - largest)."""
    largest, total = -float("inf"), 0.0
    for start in range(0, vocabulary, block):
        x = _load(row, start + tl.arange(0, block), vocabulary)
        before = largest
        largest = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest))
    return largest, tl.log(total)


@triton.jit
def _probabilities(row, columns, vocabulary, largest, log_total):
    """Of a block of logits, above 0, and their logarithms."""
    log_p = _load(row, columns, vocabulary) - largest - log_total
    return tl.exp(tl.maximum(log_p, _LOWEST)), log_p


@triton.jit
def _load(row, columns, vocabulary):
    """Past the vocabulary's end there is no infinity that would make anything NaN."""
    return tl.load(row + columns, columns < vocabulary, other=-1e30).to(tl.float32)
