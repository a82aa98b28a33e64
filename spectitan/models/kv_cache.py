"""Keys and values of earlier tokens, for rows of different length."""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where the tokens of one cached forward go; the same in every layer."""

    index: Tensor  # int64 [batch, m], the slot of each token: lengths + 0 .. m - 1
    start: int  # the first slot when it is the same in all rows, else -1
    stop: int  # one past the last slot of the longest row: attention looks no further

    def one(self, place: int) -> "Slots":
        """The slots of one of the m tokens, those before it being written already."""
        after = self.index.shape[1] - 1 - place
        return Slots(self.index[:, place : place + 1], self.start if self.start < 0 else self.start + place, self.stop - after)


class KVCache:
    """Keys and values of `length` slots a row. A committed token's slot is its place in the row.

    A forward writes its m tokens into slots `lengths + 0 .. m - 1` and leaves `lengths` alone; `commit(counts)` keeps the
    first counts of them, `keep` a path through a tree of them; the rest is garbage that the next forward overwrites. A rollback
    lowers `lengths`.

    Heads, their size and the dtype are those of the first keys written: they are known where they are made, whatever
    precision or sharding that runs under.

    Args:
        layers, batch, length: shape; length is the slots of a row.
        device: of everything.

    Attributes:
        lengths: int64 [batch], committed tokens.
        common_length: the same number as long as the host knows that it is one for all rows, else None.
    """

    def __init__(self, layers: int, batch: int, length: int, device: torch.device | str):
        self.length = length
        self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.common_length: int | None = 0
        self._keys: list[Tensor | None] = [None] * layers  # [batch, kv_heads, length, head_dim] each
        self._values: list[Tensor | None] = [None] * layers

    @property
    def lengths(self) -> Tensor:
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self._lengths, self.common_length = lengths, None

    def next_slots(self, m: int) -> Slots:
        """The slots of the next m tokens of every row. Call it once a forward: on a GPU it waits for `lengths`, unless every
        commit so far was of one number for all rows."""
        lengths = self._lengths.tolist() if self.common_length is None else [self.common_length]
        longest = max(lengths)
        assert longest + m <= self.length, f"the cache has {self.length} slots; {longest} are committed and {m} more were asked for"
        index = self._lengths[:, None] + torch.arange(m, device=self._lengths.device)
        return Slots(index, longest if min(lengths) == longest else -1, longest + m)

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Stores [batch, kv_heads, m, head_dim]; returns views [batch, kv_heads, slots.stop, head_dim] for attention."""
        if self._keys[layer] is None:  # zeros: a masked slot has weight 0, but 0 times the NaN of unset memory would be NaN
            self._keys[layer], self._values[layer] = (x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (keys, values))
        all_keys, all_values = self._keys[layer], self._values[layer]
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
        self._lengths = self._lengths + counts
        known = self.common_length is not None and isinstance(counts, int)
        self.common_length = self.common_length + counts if known else None

    def keep(self, places: Tensor, counts: Tensor) -> None:
        """Moves tokens that the last forward wrote to the first of its slots, and commits them.

        Args:
            places: int64 [batch, n], their places among the m tokens of that forward. What stands past `counts` is moved too.
            counts: int64 [batch], how many of the n are committed.
        """
        rows = torch.arange(len(places), device=places.device)[:, None]
        source = self.lengths[:, None] + places
        target = self.lengths[:, None] + torch.arange(places.shape[1], device=places.device)
        for stored in (*self._keys, *self._values):
            stored[rows, :, target] = stored[rows, :, source]
        self.commit(counts)
