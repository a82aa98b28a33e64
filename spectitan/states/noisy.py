"""Noise on the states that a drafter starts from, so that it bears its own later inaccuracy (EAGLE, Li et al. 2024)."""

import torch
from torch import Tensor

from spectitan.decoding.sampling import Stream
from spectitan.keyed_random import uniform
from spectitan.types import BaseStates, StateSource, TokenBatch


class NoisyStates:
    """Another source's states, each number of the taps moved by at most `std`, uniformly; the final state, which teaches, stays.

    The noise is a function of (seed, a sample's place in the global order, position, tap) alone, on every layout.
    """

    def __init__(self, source: StateSource, std: float, seed: int):
        self.source, self.std, self.seed = source, std, seed

    def begin(self, batch: TokenBatch) -> TokenBatch:
        return self.source.begin(batch)

    def states(self, batch: TokenBatch) -> BaseStates:
        states = self.source.states(batch)
        noisy = tuple(tap + self._noise(batch, place, tap) for place, tap in enumerate(states.taps))
        return BaseStates(states.final, noisy)

    def _noise(self, batch: TokenBatch, place: int, tap: Tensor) -> Tensor:
        _, length, hidden_size = tap.shape
        position, number = (torch.arange(size, device=tap.device) for size in (length, hidden_size))
        keys = batch.index.to(tap.device)[:, None, None], place, position[:, None], number
        return ((uniform(self.seed, Stream.NOISE, *keys) * 2 - 1) * self.std).to(tap.dtype)
