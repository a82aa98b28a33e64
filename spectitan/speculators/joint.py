"""Base and speculator trained together, from one forward of the base."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectitan.models.readout import Readout
from spectitan.speculators.base import Speculator
from spectitan.speculators.next_token import NextToken
from spectitan.types import BaseStates, Loss, Targets, TokenBatch


class JointTargets(NamedTuple):
    """The supervised pairs of both losses."""

    base: Targets
    speculator: Targets

    @property
    def counts(self) -> Tensor:
        """int64 [1 + steps]: the base's, then those of the speculator's steps."""
        return torch.cat([target.counts for target in self])

    def to(self, device: torch.device) -> "JointTargets":
        return JointTargets(*(target.to(device) for target in self))


class Joint(Speculator):
    """Base loss + coefficient * speculator loss, in the interface of a speculator: row 0 of the sums is the base's own loss.

    The base's part of the gradient is the same, bit for bit, as without a speculator, if states are detached or the coefficient
    is 0: what is added to it is nothing, or 0.

    Args:
        next_token: the base's own loss.
        speculator: may be sharded; it stays a root of its own.
        coefficient: training.speculator_loss_coeff.
        detach_states: the speculator's gradient ends at the base's states.
    """

    def __init__(self, next_token: NextToken, speculator: Speculator, coefficient: float, detach_states: bool):
        super().__init__()
        self.next_token, self.speculator = next_token, speculator
        self.coefficient, self.detach_states = coefficient, detach_states
        self.taps, self.steps, self.metrics = speculator.taps, 1 + speculator.steps, speculator.metrics

    @property
    def rows(self) -> tuple[str, ...]:
        return (*self.next_token.rows, *self.speculator.rows)

    def align(self, batch: TokenBatch) -> JointTargets:
        return JointTargets(self.next_token.align(batch), self.speculator.align(batch))

    def forward(self, batch: TokenBatch, states: BaseStates, targets: JointTargets, denominators: Tensor, readout: Readout) -> Loss:
        base = self.next_token(batch, states, targets.base, denominators[:1], readout)
        states = states.detach() if self.detach_states else states
        speculator = self.speculator(batch, states, targets.speculator, denominators[1:], readout)
        base_sums = F.pad(base.sums, (0, len(self.metrics) - base.sums.shape[1]))  # it has none of a family's own columns
        return Loss(base.total + self.coefficient * speculator.total, torch.cat([base_sums, speculator.sums]), targets.counts)

    def flops(self, targets_per_step: list[int], tokens: int) -> int:
        return self.next_token.flops(targets_per_step[:1], tokens) + self.speculator.flops(targets_per_step[1:], tokens)
