"""Noise on the taps: bounded, uniform, a function of seed and sample, and none on what teaches."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectitan.states import noisy
from spectitan.states.noisy import NoisyStates
from spectitan.types import BaseStates, TokenBatch

STD, SHAPE = 0.05, (3, 17, 24)


class Given:
    """A source of states that are given."""

    def __init__(self, states: BaseStates):
        self.given = states

    def begin(self, batch: TokenBatch) -> TokenBatch:
        return batch

    def states(self, batch: TokenBatch) -> BaseStates:
        return self.given


def batch_of(index: list[int]) -> TokenBatch:
    tokens = torch.zeros(len(index), SHAPE[1], dtype=torch.int64)
    return TokenBatch(tokens, tokens >= 0, tokens, torch.tensor(index), torch.tensor(index))


def noise(index: list[int], seed: int = 7, dtype: torch.dtype = torch.float32, std: float = STD) -> BaseStates:
    zeros = torch.zeros(len(index), *SHAPE[1:], dtype=dtype)
    source = NoisyStates(Given(BaseStates(zeros, (zeros, zeros))), std, seed)
    return source.states(source.begin(batch_of(index)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_uniform_within_its_bounds(dtype):
    states = noise(list(range(40)), dtype=dtype)
    assert not states.final.any() and all(tap.dtype == dtype for tap in states.taps)
    for tap in states.taps:
        values = tap.double().flatten() / STD
        assert values.abs().max() <= 1.01
        # Of n uniform numbers in [-1, 1]: mean 0 +- 1/sqrt(3n), variance 1/3 +- sqrt(4/45/n); five deviations.
        n = len(values)
        assert abs(values.mean()) < 5 / (3 * n) ** 0.5 and abs(values.var() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
        quarters = torch.histc(values, 4, -1, 1) / n
        assert (quarters - 0.25).abs().max() < 5 * (3 / 16 / n) ** 0.5 + (0.01 if dtype == torch.bfloat16 else 0)
    ours, theirs = (tap.double().flatten() for tap in states.taps)
    assert abs(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) < 5 / len(ours) ** 0.5


def test_it_hangs_on_seed_and_sample_alone():
    whole, parts = noise([5, 2, 9]), [noise([5]), noise([2, 9])]
    for place in range(2):
        assert torch.equal(whole.taps[place], torch.cat([part.taps[place] for part in parts]))
    assert not torch.equal(noise([5]).taps[0], noise([5], seed=8).taps[0]) and not torch.equal(noise([5]).taps[0], noise([6]).taps[0])
    assert not torch.equal(whole.taps[0][:, 0], whole.taps[0][:, 1])


def test_it_is_added():
    states = BaseStates(torch.randn(SHAPE), (torch.randn(SHAPE),))
    given = NoisyStates(Given(states), STD, 7).states(batch_of([5, 2, 9]))
    torch.testing.assert_close(given.taps[0] - states.taps[0], noise([5, 2, 9]).taps[0], rtol=0, atol=1e-6)
    assert torch.equal(given.final, states.final)


@pytest.mark.parametrize("numbers", [1, 24 * 5, 24 * 20, 24 * 51])
def test_it_is_drawn_in_parts_and_the_same(numbers, monkeypatch):
    expected = noise([5, 2, 9])
    monkeypatch.setattr(noisy, "_NUMBERS", numbers)
    with Largest() as largest:
        found = noise([5, 2, 9])
    assert all(torch.equal(*taps) for taps in zip(found.taps, expected.taps))
    assert largest.wide <= max(numbers, SHAPE[2], math.prod(SHAPE[:2]))


class Largest(TorchDispatchMode):
    """Notes the most numbers of 64 bits that an operation has made."""

    wide = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype.itemsize == 8:
            self.wide = max(self.wide, made.numel())
        return made
