"""Noise on the states that a drafter starts from, so that it bears its own later inaccuracy (EAGLE, Li et al. 2024)."""

import torch
from torch import Tensor

from spectitan.decoding.sampling import Stream
from spectitan.keyed_random import uniform
from spectitan.types import BaseStates, StateSource, TokenBatch

_NUMBERS = 2**20


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
        noisy = tuple(self._noise(batch, place, tap).add_(tap) for place, tap in enumerate(states.taps))
        return BaseStates(states.final, noisy)

    def _noise(self, batch: TokenBatch, place: int, tap: Tensor) -> Tensor:
        """A new tensor like the tap. It is drawn in 64 bits, so many numbers at a time."""
        batch_size, length, hidden_size = tap.shape
        index = batch.index.to(tap.device).repeat_interleave(length, output_size=batch_size * length)
        position, number = (torch.arange(size, device=tap.device) for size in (length, hidden_size))
        position = position.repeat(batch_size)
        noise = torch.empty(tap.shape, dtype=tap.dtype, device=tap.device)
        rows = max(1, _NUMBERS // hidden_size)
        for part, keys, at in zip(noise.flatten(0, 1).split(rows), index.split(rows), position.split(rows)):
            part.copy_((uniform(self.seed, Stream.NOISE, keys[:, None], place, at[:, None], number) * 2 - 1) * self.std)
        return noise
