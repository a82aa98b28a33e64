"""The base's own next-token loss, in the interface of a speculator that looks no tokens ahead."""

from torch import Tensor

from spectitan.config.sections import Objective
from spectitan.models.readout import Readout
from spectitan.objectives.fused_linear import fused_linear_loss
from spectitan.speculators.base import Speculator, align_targets, collect_loss
from spectitan.types import BaseStates, Loss, Targets, TokenBatch


class NextToken(Speculator):
    """`speculator.type = "none"`: cross-entropy of the base's head against the text. It has no parameters and drafts nothing."""

    rows = ("base",)

    def __init__(self, hidden_size: int, vocab_size: int, objective: Objective):
        super().__init__()
        self.hidden_size, self.vocab_size, self.chunk_rows = hidden_size, vocab_size, objective.chunk_rows

    def align(self, batch: TokenBatch) -> Targets:
        return align_targets(batch, steps=1, lookahead=0)

    def forward(self, batch: TokenBatch, states: BaseStates, targets: Targets, denominators: Tensor, readout: Readout) -> Loss:
        hidden = states.final.flatten(0, 1)[targets.state]
        tokens = batch.tokens.flatten()[targets.teacher + 1]

        def loss_of_head(readout: Readout, hidden: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
            return fused_linear_loss(hidden, readout.head.weight, row_weights, loss="ce", targets=tokens, chunk_rows=self.chunk_rows)

        total, row_stats = readout.call(loss_of_head, hidden, self.row_weights(targets, denominators))
        return collect_loss(total, row_stats, targets, batch.tokens.numel())

    def flops(self, targets_per_step: list[int], tokens: int) -> int:
        return 3 * 2 * sum(targets_per_step) * self.hidden_size * self.vocab_size
