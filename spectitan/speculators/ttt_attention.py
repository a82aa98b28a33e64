"""Attention of test-time training (EAGLE-3, Li et al. 2025, https://arxiv.org/abs/2503.01840), without a rows x rows tensor.

All rows of a micro-batch lie one after another; a document is a run of them. At step k a row sees

    of step 0        the keys of its document up to its own: the block
    of steps 1 .. k  its own key of that step: a diagonal each

which is what a drafter sees that has cached the verified tokens and then k drafted ones. The block's softmax and the diagonals'
terms are merged by their log-sum-exps. In a sliding window of w tokens, the row of step k stands k tokens further: of step 0 it
sees the last w - k keys.

Shapes: queries [1, heads, R, head_dim], keys and values [1, kv_heads, R, head_dim]. R is T, all rows, at step 0, and at later steps
the rows that have targets there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from spectitan import compiled
from spectitan.errors import UserError
from spectitan.models import packed_attention
from spectitan.models.kv_cache import Slots
from spectitan.models.layers import attention_bias

BACKENDS = ("auto", "flex", "sdpa", "eager")
_BAND_ROWS = 256  # queries of one call inside a sliding window: its mask has so many rows


class Memory:
    """Keys and values of one layer: of step 0 for all rows, and of each later step for the rows that go on."""

    def __init__(self):
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)


class Piece(NamedTuple):
    """Consecutive queries of one document, and the keys that they see."""

    queries: slice
    keys: slice
    causal: bool  # from the document's first row on; else a band: query r sees the keys r .. r + reach - 1 of the slice


def document_spans(document_ids: Tensor) -> Tensor:
    """int64 [documents, 2]: first row of each document and the row after its last, over batch * seq rows without padding."""
    ids = document_ids.flatten()
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    starts = first.nonzero()[:, 0]
    stops = torch.cat([starts[1:], starts.new_tensor([len(ids)])])
    return torch.stack([starts, stops], 1)[ids[starts] >= 0]


def choose_backend(name: str, device: torch.device) -> str:
    """flex, sdpa or eager, of speculator.attention. Raises UserError for one that has no backward on the device."""
    if device.type == "meta":  # a plan is made: flex would take much the same
        return "eager" if name == "eager" else "sdpa"
    own, other = ("sdpa", "flex") if device.type == "cpu" else ("flex", "sdpa")
    if name == other:
        where = "a CPU" if device.type == "cpu" else "a GPU"
        raise UserError(f'speculator.attention = "{name}" has no backward on {where}; allowed: auto, {own}, eager')
    return own if name == "auto" else name


class TTTAttention:
    """The attention of one micro-batch.

    Args:
        backend: one of BACKENDS; auto is flex on a GPU, sdpa on a CPU.
        document_ids: int64 [batch, seq], where the computation is.
        spans: what `document_spans` says of them, on the host.
        rows: int64 [R], ascending, that go on after step 0, where the computation is.
    """

    def __init__(self, backend: str, document_ids: Tensor, spans: Tensor, rows: Tensor):
        self.backend = choose_backend(backend, document_ids.device)
        self.document_ids, self.spans, self.rows = document_ids.flatten(), spans.tolist(), rows
        self._plans: dict[int, object] = {}  # by reach

    def __call__(self, queries: Tensor, memory: Memory, window: int) -> Tensor:
        """[1, heads, R, head_dim], of the queries of the step whose keys and values `memory` was given last. window: -1 for none."""
        (block_keys, *own_keys), (block_values, *own_values) = memory.keys, memory.values
        step, length = len(own_keys), block_keys.shape[2]
        reach = length if window == -1 else min(length, max(0, window - step))
        if window != -1:
            own_keys, own_values = own_keys[max(0, step - window) :], own_values[max(0, step - window) :]
        rows = self.rows if step and len(self.rows) < length else None  # None: all
        if self.backend == "sdpa":
            pieces = self._plan(reach, self._pieces)
            return _PerDocument.apply(pieces, reach, rows, queries, block_keys, block_values, *own_keys, *own_values)
        attended, lse = self._block(_spread(queries, rows, length), block_keys, block_values, reach)
        return _merge(queries, _gather(attended, rows), _gather(lse, rows), own_keys, own_values) if step else attended

    def _block(self, queries: Tensor, keys: Tensor, values: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Attention over step 0 alone, of all rows, and its log-sum-exp [1, heads, T] in float32 or wider."""
        if self.backend == "eager":
            return _by_pieces(_eager_piece, self._plan(reach, self._pieces), reach, queries, *_for_each_head(queries, keys, values))
        attended, more = packed_attention.attend(queries, keys, values, self._plan(reach, self._block_mask))
        return attended, more.lse

    def _plan(self, reach: int, make):
        if reach not in self._plans:
            self._plans[reach] = make(reach)
        return self._plans[reach]

    def _pieces(self, reach: int) -> list[Piece]:
        pieces = []
        for start, stop in self.spans if reach else ():
            causal_stop = min(stop, start + reach)
            pieces.append(Piece(slice(start, causal_stop), slice(start, causal_stop), True))
            for first in range(causal_stop, stop, _BAND_ROWS):
                last = min(stop, first + _BAND_ROWS)
                pieces.append(Piece(slice(first, last), slice(first - reach + 1, last), False))
        return pieces

    def _block_mask(self, reach: int) -> BlockMask:
        return packed_attention.document_block_mask(self.document_ids[None], reach)


def cached_bias(slots: Slots, window: int, dtype: torch.dtype) -> Tensor | None:
    """Bias of attention over the slots of a cache whose places are positions; None where attention needs none."""
    m, windowed = slots.index.shape[1], 0 < window < slots.stop
    if not windowed and slots.start >= 0 and (m == 1 or slots.start == 0):
        return None
    keys = torch.arange(slots.stop, device=slots.index.device)
    visible = keys <= slots.index[..., None]
    if windowed:
        visible = visible & (keys > slots.index[..., None] - window)
    return attention_bias(visible, dtype)


class _PerDocument(torch.autograd.Function):
    """One call of PyTorch's fused CPU attention for each piece, and the diagonals, with the gradient of both in closed form.

    Given the merged output and log-sum-exp, the fused backward of the block gives exactly the block's share of the gradient:
    its weights are exp(score - log-sum-exp), whatever else the log-sum-exp holds (as in ring attention).

    In float32: on a CPU the fused kernels are no faster in bfloat16, and make others, which they keep, for each new length of a
    document. What is kept for the backward has the dtype of the inputs.
    """

    @staticmethod
    def forward(ctx, pieces, reach, rows, queries, keys, values, *own):
        queries, keys, values, *own = (x.detach() for x in (queries, keys, values, *own))  # or graphs would differ with their flags
        spread = _spread(_widen(queries), rows, keys.shape[2])
        attended, lse = _by_pieces(_fused_piece, pieces, reach, spread, *_for_each_head(queries, _widen(keys), _widen(values)))
        attended, lse = _gather(attended, rows), _gather(lse, rows)
        for key, value in zip(own[: len(own) // 2], own[len(own) // 2 :]):
            attended, lse = compiled.call(_add_own, queries, attended, lse, key, value, rows=2)
        attended = torch.empty_like(queries).copy_(attended)  # row by row, as queries lie
        ctx.pieces, ctx.reach, ctx.rows = pieces, reach, rows
        ctx.save_for_backward(queries, keys, values, attended, lse, *own)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, d_attended):
        queries, keys, values, attended, lse, *own = ctx.saved_tensors
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        length = keys.shape[2]
        spread = [_spread(_widen(x), ctx.rows, length) for x in (queries, d_attended, attended, lse)]
        repeated = _for_each_head(queries, _widen(keys), _widen(values))
        d_queries, d_keys, d_values = _block_backward(ctx.pieces, ctx.reach, *spread, *repeated)
        d_queries, d_keys, d_values = _gather(d_queries, ctx.rows), _sum_groups(d_keys, keys), _sum_groups(d_values, values)
        d_own_keys, d_own_values = [], []
        for key, value in zip(own_keys, own_values):
            d_queries, d_key, d_value = compiled.call(_own_backward, queries, d_attended, attended, lse, key, value, d_queries, rows=2)
            d_own_keys.append(d_key)
            d_own_values.append(d_value)
        return None, None, None, d_queries.to(queries.dtype), d_keys, d_values, *d_own_keys, *d_own_values


def _by_pieces(attend, pieces: list[Piece], reach: int, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all rows; 0 and -inf where no piece has a row."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    attended, lse = _blank(queries, pieces), torch.full(queries.shape[:3], -torch.inf, dtype=wide, device=queries.device)
    band = _band(pieces, reach, queries)
    for piece in pieces:
        q, k, v = queries[:, :, piece.queries], keys[:, :, piece.keys], values[:, :, piece.keys]
        attended[:, :, piece.queries], lse[:, :, piece.queries] = attend(q, k, v, _bias(band, piece))
    return attended, lse


def _fused_piece(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, bias is None, attn_mask=bias)


def _eager_piece(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores of a piece written out, differentiable."""
    scores = (queries @ keys.mT).to(torch.promote_types(queries.dtype, torch.float32)) * queries.shape[3] ** -0.5
    if bias is None:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    else:
        scores = scores + bias
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def _block_backward(pieces, reach, queries, d_attended, attended, lse, keys, values) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all rows' queries, and of keys and values by head. A row outside `rows` has query and gradient 0, and adds 0."""
    d_queries, d_keys, d_values = _blank(queries, pieces), torch.zeros_like(keys), torch.zeros_like(values)
    band = _band(pieces, reach, queries)
    for piece in pieces:
        at, seen, bias = piece.queries, piece.keys, _bias(band, piece)
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_attended[:, :, at], queries[:, :, at], keys[:, :, seen], values[:, :, seen], attended[:, :, at], lse[:, :, at],
            0.0, bias is None, attn_mask=bias,
        )  # fmt: skip
        d_queries[:, :, at] = d_q
        d_keys[:, :, seen] += d_k
        d_values[:, :, seen] += d_v
    return d_queries, d_keys, d_values


def _blank(queries: Tensor, pieces: list[Piece]) -> Tensor:
    """Memory for what each row gets of its piece; 0 unless every row has one."""
    rows = sum(piece.queries.stop - piece.queries.start for piece in pieces)
    return torch.empty_like(queries) if rows == queries.shape[2] else torch.zeros_like(queries)


def _band(pieces: list[Piece], reach: int, like: Tensor) -> Tensor | None:
    """[rows, rows + reach - 1]: 0 where key column c is one of r .. r + reach - 1, else -inf; None if no piece needs it."""
    rows = max((piece.queries.stop - piece.queries.start for piece in pieces if not piece.causal), default=0)
    if not rows:
        return None
    ahead = torch.arange(rows + reach - 1, device=like.device) - torch.arange(rows, device=like.device)[:, None]
    return torch.zeros_like(ahead, dtype=like.dtype).masked_fill_((ahead < 0) | (ahead >= reach), -torch.inf)


def _bias(band: Tensor | None, piece: Piece) -> Tensor | None:
    return None if piece.causal else band[: piece.queries.stop - piece.queries.start, : piece.keys.stop - piece.keys.start]


def _merge(queries: Tensor, attended: Tensor, lse: Tensor, own_keys, own_values) -> Tensor:
    """The block's output with the diagonals' terms added, differentiable: all at once, so that little is kept for the backward."""
    wide = _widen(queries)
    scores = [_own_score(wide, key) for key in own_keys]
    total = torch.stack([lse, *scores]).logsumexp(0)
    groups = (1, own_keys[0].shape[1], -1, *queries.shape[2:])
    merged = attended.view(groups) * (lse - total).exp().view(groups[:-1])[..., None]
    for score, value in zip(scores, own_values):
        merged = merged + (score - total).exp().view(groups[:-1])[..., None] * value[:, :, None]
    return merged.to(queries.dtype).view_as(queries)


# ---- a diagonal: for torch.compile, which makes one loop over the rows of each function ----


def _add_own(queries: Tensor, attended: Tensor, lse: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output, in float32 or wider, and log-sum-exp of what each row has attended to and its own key."""
    score = _own_score(queries, key)
    total = torch.logaddexp(lse, score)
    before, now = ((x - total).exp()[..., None] for x in (lse, score))
    return before * attended + now * _repeat(_widen(value), queries), total


def _own_backward(queries, d_attended, attended, lse, key, value, d_queries) -> tuple[Tensor, Tensor, Tensor]:
    """d_queries, in float32 or wider, with the diagonal's share added; gradients of its keys and values."""
    scaled, d_out = _widen(queries) * queries.shape[3] ** -0.5, _widen(d_attended)
    weight = (_own_score(queries, key) - lse).exp()
    d_score = weight * (d_out * (_repeat(_widen(value), queries) - _widen(attended))).sum(-1)
    d_key = _sum_groups(d_score[..., None] * scaled, key)
    d_value = _sum_groups(weight[..., None] * d_out, value)
    d_queries = d_queries + (d_score * queries.shape[3] ** -0.5)[..., None] * _repeat(_widen(key), queries)
    return d_queries, d_key.to(key.dtype), d_value.to(value.dtype)


def _own_score(queries: Tensor, key: Tensor) -> Tensor:
    """[1, heads, R], in float32 or wider."""
    grouped = _widen(queries).unflatten(1, (key.shape[1], -1))
    return (grouped * _widen(key)[:, :, None]).sum(-1).flatten(1, 2) * queries.shape[3] ** -0.5


def _repeat(shared: Tensor, queries: Tensor) -> Tensor:
    """[1, kv_heads, R, head_dim] -> [1, heads, R, head_dim]: as `_for_each_head`, fused into what reads it."""
    _, kv_heads, count, head_dim = shared.shape
    return shared[:, :, None].expand(-1, -1, queries.shape[1] // kv_heads, -1, -1).reshape(1, -1, count, head_dim)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _for_each_head(queries: Tensor, *shared: Tensor) -> list[Tensor]:
    """Keys and values repeated for the heads that share them."""
    repeats = queries.shape[1] // shared[0].shape[1]
    return [x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in shared]


def _sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """Undoes `_for_each_head` for a gradient."""
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


def _spread(x: Tensor, rows: Tensor | None, length: int) -> Tensor:
    """[1, heads, R, ...] -> [1, heads, T, ...], 0 in the other rows."""
    return x if rows is None else x.new_zeros(*x.shape[:2], length, *x.shape[3:]).index_copy(2, rows, x)


def _gather(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(2, rows)
