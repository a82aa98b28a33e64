"""How a token is chosen from logits: greedily, or by temperature and top-k with random numbers by key."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from spectitan.keyed_random import uniform
from spectitan.speculators.base import Pick


class Stream(IntEnum):
    """What a random number decides; the first key after the seed, so that no two decisions share a number."""

    TEXT = 0
    DRAFT = 1
    ACCEPT = 2
    RESAMPLE = 3


@dataclass(frozen=True)
class Sampling:
    """A sampling rule. Every random number is uniform(seed, stream, row key, round, step): rows do not influence each other.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: only the top_k most likely tokens (and those that tie with the last of them) can be drawn; 0: all.
        seed: of all random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 [..., vocab] that a token is drawn from; only when not greedy."""
        logits = logits.float()
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        return (logits / self.temperature).softmax(-1)

    def uniform(self, stream: Stream, row_keys: Tensor, round: int, step: int | slice = 0) -> Tensor:
        """float64 in (0, 1): [batch], or [batch, k] for the steps of a slice."""
        if isinstance(step, slice):
            step = torch.arange(step.start or 0, step.stop, device=row_keys.device)
            row_keys = row_keys[:, None]
        return uniform(self.seed, stream, row_keys, round, step)

    def picker(self, stream: Stream, row_keys: Tensor, round: int) -> Pick:
        """The function that chooses tokens of one round: (logits, step) -> (tokens, probabilities or None when greedy).

        Args:
            row_keys: int64 [batch], what identifies each row in every batch it may be part of.
        """

        def pick(logits: Tensor, step: int | slice) -> tuple[Tensor, Tensor | None]:
            if self.greedy:
                return logits.argmax(-1), None
            probabilities = self.probabilities(logits)
            return draw(probabilities, self.uniform(stream, row_keys, round, step)), probabilities

        return pick


def draw(weights: Tensor, quantile: Tensor) -> Tensor:
    """int64 [...]: the token at a quantile of a distribution given by weights [..., vocab] >= 0 that need not sum to 1.

    The first token whose cumulative weight reaches quantile * total. As quantile [...] is above 0, that token's own weight is
    above 0 too: a token that was masked out is never drawn, whatever is rounded.
    """
    cumulative = weights.double().cumsum(-1)
    return torch.searchsorted(cumulative, quantile[..., None] * cumulative[..., -1:])[..., 0]
