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
    PROMPT = 4  # of stage 2: where a prompt is cut from the text
    CONTINUATION = 5  # of stage 2: the tokens that follow it
    NOISE = 6  # on the hidden states that a drafter is trained on


@dataclass(frozen=True)
class Sampling:
    """A sampling rule.

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
        return self._softmax(logits)

    def choose(self, logits: Tensor, quantile: Tensor) -> Tensor:
        """int64 [batch]: the tokens at these quantiles [batch] of `probabilities`, of logits [batch, vocab].

        Where top_k leaves few tokens, the vocabulary is passed over only once, to find them. They are exactly top_k then: which
        of those that tie for the last place, is open.
        """
        if self.greedy:
            return logits.argmax(-1)
        if not 0 < self.top_k < logits.shape[-1]:
            return draw(self.probabilities(logits), quantile)
        values, tokens = logits.topk(self.top_k, -1)
        tokens, order = tokens.sort(-1)  # a quantile is one of the distribution in the vocabulary's order
        weights = self._softmax(values.gather(-1, order).float())
        return tokens.gather(-1, draw(weights, quantile)[:, None])[:, 0]

    def _softmax(self, logits: Tensor) -> Tensor:
        # Against the largest: divided by a tiny temperature, others fall to -inf, where they would rise to +inf. One that is 0 in float32
        # would make the largest 0 / 0.
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


class Sampler:
    """A rule at work on one batch. Every random number is uniform(seed, stream, row key, round, step): rows, and the batches
    they may be part of, do not influence each other.

    Args:
        rule: temperature, top_k and seed.
        row_keys: int64 [batch], what identifies each row in any batch.
        steps: tokens chosen in a round of one stream, at most.
    """

    _ROUNDS = 32  # numbers are made for as many rounds at once: a hash is a hundred small operations, and a token takes few more

    def __init__(self, rule: Sampling, row_keys: Tensor, steps: int = 1):
        self.rule, self.row_keys, self.steps = rule, row_keys, steps
        self._blocks: dict[Stream, tuple[int, Tensor]] = {}  # the block of rounds at hand, and its numbers [batch, rounds, steps]

    def uniform(self, stream: Stream, round: int, step: int | slice = 0) -> Tensor:
        """float64 in (0, 1): [batch], or [batch, k] for the steps of a slice."""
        block, place = divmod(round, self._ROUNDS)
        if stream not in self._blocks or self._blocks[stream][0] != block:
            device = self.row_keys.device
            rounds = block * self._ROUNDS + torch.arange(self._ROUNDS, device=device)
            steps = torch.arange(self.steps, device=device)
            self._blocks[stream] = block, uniform(self.rule.seed, stream, self.row_keys[:, None, None], rounds[:, None], steps)
        return self._blocks[stream][1][:, place, step]

    def picker(self, stream: Stream, round: int) -> Pick:
        """The function that chooses the tokens of a round: (logits, step) -> (tokens, probabilities or None when greedy)."""

        def pick(logits: Tensor, step: int | slice) -> tuple[Tensor, Tensor | None]:
            if self.rule.greedy:
                return logits.argmax(-1), None
            probabilities = self.rule.probabilities(logits)
            return draw(probabilities, self.uniform(stream, round, step)), probabilities

        return pick


def draw(weights: Tensor, quantile: Tensor) -> Tensor:
    """int64 [...]: the token at a quantile of a distribution given by weights [..., vocab] >= 0 that need not sum to 1.

    The first token whose cumulative weight reaches quantile * total. As quantile [...] is above 0, that token's own weight is
    above 0 too: a token that was masked out is never drawn, whatever is rounded.
    """
    cumulative = weights.double().cumsum(-1)
    return torch.searchsorted(cumulative, quantile[..., None] * cumulative[..., -1:])[..., 0]
