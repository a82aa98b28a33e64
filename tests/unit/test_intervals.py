import bisect
import math
from fractions import Fraction

import pytest

from spectitan.training.intervals import is_due, next_due, steps_of, steps_of_run


@pytest.mark.parametrize("interval", [1, 2, 7, 1000, Fraction(5, 2), Fraction(22, 7), Fraction(2, 3), Fraction(997, 13)])
def test_due_are_the_first_steps_at_or_after_each_multiple(interval):
    expected = sorted({math.ceil(multiple * interval) for multiple in range(1, 400)})
    last = min(expected[-1], 250)
    due = [step for step in range(1, last + 1) if is_due(step, interval)]
    assert due == [step for step in expected if step <= last]
    for step in range(last):
        assert next_due(step, interval) == expected[bisect.bisect(expected, step)]


@pytest.mark.parametrize("epochs, samples, batch, steps", [(0.7, 10, 4, 2), (3, 10, 4, 8), (0.1, 10, 4, 1), (0.1, 30, 3, 1), (1, 12, 4, 3)])
def test_a_run_has_whole_steps(epochs, samples, batch, steps):
    assert steps_of_run(epochs, samples, batch) == steps


def test_parts_of_an_epoch_add_up_to_it():
    """In floating point, 0.1 * 3 * 10 / 1 is more than 3, and the step would come one too late."""
    for samples, batch in ((10, 1), (1000, 7), (997, 8), (3, 5)):
        assert steps_of(0.1, samples, batch) * 10 == steps_of(1.0, samples, batch) == Fraction(samples, batch)
    assert steps_of(2.5, 100, 8) == Fraction(125, 4)
    tenths = [step for step in range(1, 31) if is_due(step, steps_of(0.1, 30, 1))]
    assert tenths == list(range(3, 31, 3))
