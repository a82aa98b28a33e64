"""Small questions about logits, answered a chunk of rows at a time: no [rows, vocabulary] tensor lives. Without gradients."""

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20


def argmax_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """int64 [N]: the largest logit of hidden [N, d] @ weight [V, d].T."""
    if not len(hidden):
        return torch.empty(0, dtype=torch.int64, device=hidden.device)
    return torch.cat([(rows @ weight.T).argmax(-1) for rows in hidden.split(_chunk_rows(weight))])


def expected_acceptance(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_rows: Tensor, ids: Tensor
) -> Tensor:
    """[N], sum over the draft vocabulary of min(p, q): the chance that the base keeps a token drawn from q.

    p is the teacher's distribution over its whole vocabulary; the drafter's q knows some of its tokens only.

    Args:
        hidden, weight: [N, d], [draft vocab, d], of q.
        teacher_hidden, teacher_weight: [M, d], [V, d], of p.
        teacher_rows: int64 [N], of teacher_hidden.
        ids: int64 [draft vocab], the token of each row of weight.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = [torch.empty(0, dtype=wide, device=hidden.device)]
    size = _chunk_rows(teacher_weight)
    for rows, teachers in zip(hidden.split(size), teacher_rows.split(size)):
        q = (rows @ weight.T).to(wide).softmax(-1)
        p = (teacher_hidden[teachers] @ teacher_weight.T).to(wide).softmax(-1)
        parts.append(torch.minimum(p.index_select(1, ids), q).sum(-1))
    return torch.cat(parts)


def _chunk_rows(weight: Tensor) -> int:
    return max(1, _CHUNK_BYTES // (4 * len(weight)))
