"""Hidden states computed by the base in this job."""

import torch
from torch import nn

from spectitan.types import BaseStates, TokenBatch


class OnlineStates:
    """Runs the base on every batch.

    Args:
        base: EmbedLLaMA or another base; may be sharded.
        taps: layer ids whose states are kept.
        frozen: the base is not trained: its forward records no gradient.
    """

    def __init__(self, base: nn.Module, taps: tuple[int, ...], frozen: bool):
        self.base, self.taps, self.frozen = base, taps, frozen

    def begin(self, batch: TokenBatch) -> TokenBatch:
        return batch

    def states(self, batch: TokenBatch) -> BaseStates:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.base(batch.tokens, batch.document_ids, taps=self.taps)
