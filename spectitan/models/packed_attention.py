"""FlexAttention inside documents that lie one after another in a row: a GPU's way to attend without a mask of seq x seq."""

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

_BLOCK = 128


def can_flex(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlexAttention has kernels for it: on GPUs, up to float32, for heads of 16 and more. Plans, on meta, are made for GPUs."""
    return device.type in ("cuda", "meta") and dtype != torch.float64 and head_dim >= 16


def document_block_mask(document_ids: Tensor, reach: int) -> BlockMask:
    """FlexAttention's mask, its blocks in closed form: nothing of seq x seq is evaluated.

    A document is a run of equal ids, so the keys that a block of queries sees are a run too: from the first one that its first
    query sees up to its last query. Of those blocks, the ones that every query sees whole need no mask.

    Args:
        document_ids: int64 [batch, seq].
        reach: keys that a token sees at most, its own included.
    """
    length, device = document_ids.shape[1], document_ids.device
    index = torch.arange(length, device=device)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first_key = torch.maximum(torch.where(is_first, index, 0).cummax(1).values, index - reach + 1)  # [batch, seq], ascending
    block = torch.arange(-(-length // _BLOCK), device=device)
    lowest = first_key[:, block * _BLOCK]  # [batch, blocks]
    highest = first_key[:, ((block + 1) * _BLOCK - 1).clamp_max(length - 1)]
    first_seen = lowest // _BLOCK
    first_full = torch.minimum(-(-highest // _BLOCK), block)  # the blocks first_full .. block - 1 are seen whole
    own = block[:, None]
    partial = (block >= first_seen[..., None]) & (block < first_full[..., None]) | (block == own)  # [batch, blocks, blocks]
    full = (block >= torch.maximum(first_full, first_seen)[..., None]) & (block < own)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]

    def visible(batch, head, query, key):
        return (key <= query) & (key >= first_key[batch, query])

    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: BlockMask) -> tuple[Tensor, AuxOutput]:
    """Output [batch, heads, seq, head_dim], and beside it `lse`, the log-sum-exp of each row's scores [batch, heads, seq].

    Args:
        queries: [batch, heads, seq, head_dim].
        keys, values: [batch, kv_heads, seq, head_dim].
    """
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    grouped = queries.shape[1] != keys.shape[1]
    return flex(queries, keys, values, block_mask=mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True))


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)
