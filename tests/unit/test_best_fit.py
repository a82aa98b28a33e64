"""best_fit on counts against best-fit decreasing item by item, and against the fewest rows there can be."""

import itertools
import time

import numpy as np
import pytest

from spectitan.data.best_fit import best_fit, one_a_row


def rows_of(placed, rows: int) -> list[list[int]]:
    """Lengths in each row; each item must be placed once."""
    contents, items = [[] for _ in range(rows)], 0
    for run in placed:
        assert run.first_item == items and run.rows > 0 and run.each > 0
        items += run.rows * run.each
        for row in range(run.first_row, run.first_row + run.rows):
            contents[row] += [run.length] * run.each
    return contents


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as it is defined: a search of all rows for every item."""
    rows: list[list[int]] = []
    used: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, tokens in enumerate(used) if tokens + length <= capacity]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            used.append(0)
        fullest = max(fitting, key=used.__getitem__)
        rows[fullest].append(length)
        used[fullest] += length
    return rows


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """By dynamic programming over subsets: (rows begun, tokens in the last one), smallest first."""
    best = {0: (1, 0)}
    for subset in range(1, 2 ** len(lengths)):
        options = []
        for item, length in enumerate(lengths):
            if subset >> item & 1:
                rows, used = best[subset ^ 1 << item]
                options.append((rows, used + length) if used + length <= capacity else (rows + 1, length))
        best[subset] = min(options)
    return best[2 ** len(lengths) - 1][0]


def counts_of(lengths, capacity: int) -> np.ndarray:
    return np.bincount(lengths, minlength=capacity + 1)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64, 101])
def test_rows_are_those_of_best_fit_decreasing(capacity):
    generator = np.random.default_rng(capacity)
    for size in (1, 2, 5, 40, 300):
        for longest in {capacity, max(1, capacity // 2), max(1, capacity // 9)}:
            lengths = generator.integers(1, longest + 1, size).tolist()
            placed, rows = best_fit(counts_of(lengths, capacity), capacity)
            contents, expected = rows_of(placed, rows), one_by_one(lengths, capacity)
            assert sorted(sum(contents, [])) == sorted(lengths)
            assert rows == len(expected) and max(map(sum, contents)) <= capacity
            # Rows with as much room are alike: which of them takes an item is free, what is left is not.
            assert sorted(map(sum, contents)) == sorted(map(sum, expected))


def test_few_rows_more_than_there_must_be():
    capacity = 12
    for lengths in itertools.combinations_with_replacement([2, 3, 5, 6, 7, 9, 12], 5):
        rows = best_fit(counts_of(lengths, capacity), capacity)[1]
        assert fewest_rows(list(lengths), capacity) <= rows <= fewest_rows(list(lengths), capacity) * 11 / 9 + 1


def test_one_a_row():
    counts = counts_of([5, 5, 1, 7], 8)
    placed, rows = one_a_row(counts, 8)
    assert rows_of(placed, rows) == [[7], [5], [5], [1]]
    assert best_fit(np.zeros(9, int), 8) == one_a_row(np.zeros(9, int), 8) == ([], 0)


def test_work_hangs_on_the_lengths_and_not_on_the_number_of_items():
    counts = np.random.default_rng(0).integers(0, 1000, 8193)
    counts[0] = 0
    few, many = (best_fit(counts * factor, 8192) for factor in (1, 10**6))
    assert len(many[0]) < 100_000 and abs(len(many[0]) - len(few[0])) < 50_000
    tokens = int(counts @ np.arange(8193)) * 10**6
    assert tokens / (many[1] * 8192) > 0.998
    start = time.process_time()
    best_fit(counts * 10**6, 8192)
    assert time.process_time() - start < 5
