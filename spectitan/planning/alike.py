"""Layers that are alike are rehearsed once: a base of 80 takes no longer than one of two."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import DecoderLayer
from spectitan.planning.live_bytes import LiveBytes


class Taken(NamedTuple):
    """What a layer's forward took."""

    needed: int  # bytes at most, its result included
    sent: Counter
    keys: dict | None  # shape and dtype of those that it gave to its cache


class AlikeLayers:
    """Decoder layers of one base that record nothing for a backward. After the first call with tensors of some shapes, all of them take what
    that took, and compute nothing.
    """

    def __init__(self, layers: Iterable[DecoderLayer], ledger: LiveBytes):
        self.ledger, self.taken = ledger, {}
        for layer in layers:
            layer.forward = lambda *args, inner=layer.forward: self._forward(inner, *args)

    def _forward(self, inner, x: Tensor, rotation, bias: Tensor | None, cache: KVCache | None, index: int, slots: Slots | None) -> Tensor:
        shapes = x.shape, x.dtype, None if bias is None else bias.shape, None if slots is None else slots.stop
        if torch.is_grad_enabled() or shapes not in self.taken:
            given = _Listening(cache)
            result, needed, sent = self.ledger.measure(lambda: inner(x, rotation, bias, cache and given, index, slots))
            self.taken[shapes] = Taken(needed, sent, given.keys)
            return result
        taken = self.taken[shapes]
        self.ledger.sent.update(taken.sent)
        stored = 0
        if cache is not None:
            _, stored, _ = self.ledger.measure(lambda: cache.write(index, *(torch.empty(**taken.keys) for _ in range(2)), slots))
        result = torch.empty_like(x)
        self.ledger.hold(max(0, taken.needed - stored - x.numel() * x.element_size()), torch.uint8, "activations")
        return result


class _Listening:
    """A cache, and what was last written to it."""

    def __init__(self, cache: KVCache | None):
        self.cache, self.keys = cache, None

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        self.keys = {"size": keys.shape, "dtype": keys.dtype, "device": "meta"}
        return self.cache.write(layer, keys, values, slots)
