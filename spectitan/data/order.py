"""The order of samples as a function of their place in it: nothing to save, nothing to replay.

Sample i of a run is decided by (seed, weights, i) alone. Datasets alternate so that every prefix of the order has their
shares, rounded; each dataset's own samples are permuted anew in every pass by a keyed bijection.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from spectitan.keyed_random import hash_keys

_MASK = 2**64 - 1
_ROUNDS = 3
# Odd constants of splitmix64 (Steele, Lea, Flood 2014).
_STEP, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


class Place(NamedTuple):
    dataset: int
    sample: int


def permuted(i, size: int, key: int):
    """Where a pseudo-random bijection of range(size) sends i: a Feistel network over the next power of two, walked into the range.

    Args:
        i: int, or uint64 array; each below size.
        key: int below 2**64 that chooses the bijection.
    """
    bits = max(2, (size - 1).bit_length())
    i = _encrypted(i, bits, key)
    if isinstance(i, int):
        while i >= size:
            i = _encrypted(i, bits, key)
        return i
    while (outside := np.flatnonzero(i >= size)).size:
        i[outside] = _encrypted(i[outside], bits, key)
    return i


def _encrypted(i, bits: int, key: int):
    """A bijection of range(2**bits): each half in turn is changed by a hash of the other."""
    low = bits // 2
    high = bits - low
    left, right = i >> low, i & ((1 << low) - 1)
    for _ in range(_ROUNDS):
        left = left ^ _hashed(right, key) >> (64 - high)
        key = (key + _STEP) & _MASK
        right = right ^ _hashed(left, key) >> (64 - low)
        key = (key + _STEP) & _MASK
    return left << low | right


def _hashed(x, key: int):
    """64 bits from x and a key; the same arithmetic for Python's integers and for uint64 arrays, which wrap where those are masked."""
    x = ((x ^ key) * _MIX) & _MASK
    return ((x ^ (x >> 32)) * _STEP) & _MASK


def exact(weight: float | Fraction) -> Fraction:
    """The number that a weight is written as, not the nearest binary one."""
    return weight if isinstance(weight, Fraction) else Fraction(repr(float(weight)))


def sample_weights(weights: Sequence[float], sizes: Sequence[int], tokens: Sequence[int]) -> list[Fraction]:
    """Shares of samples that give the datasets shares of tokens: each weight, divided by the tokens in a sample.

    Args:
        weights: share of tokens of each dataset; 0 leaves one out.
        sizes, tokens: samples of each dataset, and tokens in all of them.
    """
    return [exact(weight) * size / count if weight else Fraction(0) for weight, size, count in zip(weights, sizes, tokens)]


class SampleOrder:
    """Sample i of a run, for any i >= 0, in constant time.

    Args:
        sizes: samples of each dataset.
        weights: share of each dataset in the samples, any positive numbers; 0 leaves one out. None: by size, so that
            sum(sizes) consecutive samples from a multiple of that sum are each sample once.
        seed: of the permutations.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | Fraction] | None, seed: int):
        shares = [Fraction(size) for size in sizes] if weights is None else list(map(exact, weights))
        used = sorted((k for k, share in enumerate(shares) if share > 0), key=lambda k: (-shares[k], k))
        self._sizes, self._seed = list(sizes), seed
        # A chain of two-way splits, heaviest dataset first: of the first n samples that reach a split, round(n * share) go to its
        # dataset and the rest on. Each such count grows by 0 or 1 with n, so it says where sample n itself goes.
        remaining = [sum(shares[k] for k in used[position:]) for position in range(len(used))]
        self._splits = [(k, (shares[k] / rest).numerator, (shares[k] / rest).denominator) for k, rest in zip(used, remaining)]
        self._keys: dict[tuple[int, int], int] = {}

    def __getitem__(self, i: int) -> Place:
        for dataset, share, whole in self._splits:
            before, after = ((2 * n * share + whole) // (2 * whole) for n in (i, i + 1))
            if after > before:
                return self._in_dataset(dataset, before)
            i -= before
        raise AssertionError("the last split keeps everything")

    def _in_dataset(self, dataset: int, ordinal: int) -> Place:
        size = self._sizes[dataset]
        epoch, i = divmod(ordinal, size)
        return Place(dataset, permuted(i, size, self._key(dataset, epoch)))

    def _key(self, dataset: int, epoch: int) -> int:
        key = self._keys.get((dataset, epoch))
        if key is None:
            self._keys = {other: value for other, value in self._keys.items() if other[0] != dataset or other[1] == epoch - 1}
            key = self._keys[dataset, epoch] = int(hash_keys(self._seed, dataset, epoch)) & _MASK
        return key
