"""Keys and values of earlier tokens, for rows of different length."""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where the tokens of one cached forward go; the same in every layer."""

    index: Tensor  # int64 [batch, m], the slot of each token: lengths + 0 .. m - 1
    start: int  # the first slot when it is the same in all rows, else -1
    stop: int  # one past the last slot of the longest row: attention looks no further


class KVCache:
    """Keys and values of `length` slots a row. Slot and position of a committed token are the same number.

    A forward writes its m tokens into slots `lengths + 0 .. m - 1` and leaves `lengths` alone; `commit(counts)` keeps the
    first counts of them, the rest is garbage that the next forward overwrites. A rollback lowers `lengths`.

    Args:
        layers, batch, kv_heads, length, head_dim: shape.
        dtype, device: of keys and values.

    Attributes:
        keys, values: one tensor [batch, kv_heads, length, head_dim] a layer. They start at zero: a masked slot has weight 0,
            but 0 times the NaN of unset memory would be NaN.
        lengths: int64 [batch], committed tokens.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device | str):
        shape = (batch, kv_heads, length, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = length

    def next_slots(self, m: int) -> Slots:
        """The slots of the next m tokens of every row. Call it once a forward: on a GPU it waits for `lengths`."""
        lengths = self.lengths.tolist()
        longest = max(lengths)
        assert longest + m <= self.length, f"the cache has {self.length} slots; {longest} are committed and {m} more were asked for"
        index = self.lengths[:, None] + torch.arange(m, device=self.lengths.device)
        return Slots(index, longest if min(lengths) == longest else -1, longest + m)

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Stores [batch, kv_heads, m, head_dim]; returns views [batch, kv_heads, slots.stop, head_dim] for attention."""
        all_keys, all_values = self.keys[layer], self.values[layer]
        if slots.start >= 0:  # a slice is several times faster than a scatter
            all_keys[:, :, slots.start : slots.stop] = keys
            all_values[:, :, slots.start : slots.stop] = values
        else:
            index = slots.index[:, None, :, None].expand_as(keys)
            all_keys.scatter_(2, index, keys)
            all_values.scatter_(2, index, values)
        return all_keys[:, :, : slots.stop], all_values[:, :, : slots.stop]

    def commit(self, counts: Tensor | int) -> None:
        """Keeps the first `counts` (int64 [batch], or one number for all rows) of the tokens that the last forward wrote."""
        self.lengths = self.lengths + counts
