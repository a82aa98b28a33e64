"""The order of samples: bijections, exact shares, whole epochs, from any place at once."""

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from spectitan.data.order import SampleOrder, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 257, 1000, 65_537])
def test_permutations_are_bijections_and_the_same_for_numbers_and_arrays(size):
    for key in (0, 1, 2**64 - 1):
        places = permuted(np.arange(size, dtype=np.uint64), size, key).tolist()
        assert sorted(places) == list(range(size))
        sampled = range(0, size, max(1, size // 50))
        assert [permuted(i, size, key) for i in sampled] == [places[i] for i in sampled]


def test_permutations_look_random():
    # Over many keys, every element comes to every place equally often; 7 * 7 cells, mean 1000 / 7, chi-square of 36 degrees.
    size, keys = 7, 1000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permuted(np.arange(size, dtype=np.uint64), size, key * 0x9E3779B97F4A7C15 % 2**64).astype(int)] += 1
    assert ((counts - keys / size) ** 2 / (keys / size)).sum() < 80  # one in 30,000 would exceed
    # Neighbours do not stay neighbours, and do not keep their distance.
    places = permuted(np.arange(10_000, dtype=np.uint64), 10_000, 5).astype(int)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert np.bincount(np.diff(places) % 10_000, minlength=10_000).max() < 12


def counts_by_definition(weights: list[Fraction], n: int) -> list[int]:
    """Of the first n samples, the heaviest dataset has its share rounded (halves up), the others divide the rest alike."""
    left, rest, counts = n, sum(weights), [0] * len(weights)
    for k in sorted(range(len(weights)), key=lambda k: (-weights[k], k)):
        if weights[k]:
            counts[k] = int((left * weights[k] / rest + Fraction(1, 2)) // 1)
            left, rest = left - counts[k], rest - weights[k]
    return counts


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.15, 0.05], [1, 0, 2], [0.1] * 7, [1e-3, 1, 1e-5], [3.0, 1.0, 1.0]])
def test_every_prefix_has_the_shares_of_the_weights(weights):
    order, counts = SampleOrder([500] * len(weights), weights, 1), [0] * len(weights)
    exact = [Fraction(repr(float(weight))) for weight in weights]
    for n in range(600):
        counts[order[n].dataset] += 1
        assert counts == counts_by_definition(exact, n + 1)


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.15, 0.05], [7, 1, 1, 1, 1, 1, 1, 1], [0.001, 0.999]])
@pytest.mark.parametrize("start", [0, 123_456_789_012])
def test_shares_hold_within_a_thousandth_over_ten_thousand_samples(weights, start):
    order = SampleOrder(range(1003, 1003 + len(weights)), weights, 9)
    counts = Counter(order[i].dataset for i in range(start, start + 10_000))
    for k, weight in enumerate(weights):
        assert abs(counts[k] / 10_000 - weight / sum(weights)) < 0.001


def test_an_epoch_by_size_is_every_sample_once():
    sizes = [13, 1, 40, 0, 7]
    order = SampleOrder(sizes, None, 3)
    everything = {(k, i) for k, size in enumerate(sizes) for i in range(size)}
    epochs = [[order[i] for i in range(epoch * 61, epoch * 61 + 61)] for epoch in range(4)]
    assert all(set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_each_dataset_is_gone_through_before_it_begins_anew():
    sizes = [6, 50]
    order, seen = SampleOrder(sizes, [3, 1], 0), {0: [], 1: []}
    for i in range(800):
        dataset, sample = order[i]
        seen[dataset].append(sample)
    for dataset, samples in seen.items():
        whole = len(samples) // sizes[dataset] * sizes[dataset]
        passes = np.array(samples[:whole]).reshape(-1, sizes[dataset])
        assert (np.sort(passes, 1) == np.arange(sizes[dataset])).all() and len({tuple(row) for row in passes.tolist()}) > 1


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    def order(seed):
        return SampleOrder([100, 50], [1, 1], seed)

    first = [order(1)[i] for i in range(200)]
    walked = order(1)
    assert [walked[i] for i in reversed(range(200))] == first[::-1], "the past does not matter"
    assert first != [order(2)[i] for i in range(200)]


def test_far_places_cost_what_near_ones_do():
    order = SampleOrder([10**9, 10**8], [0.7, 0.3], 0)

    def seconds(start):
        begin = time.process_time()
        for i in range(start, start + 200):
            order[i]
        return time.process_time() - begin

    near, far = (min(seconds(start + n) for n in range(5)) for start in (0, 10**15))
    assert far < 5 * near
