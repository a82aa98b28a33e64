"""Held-out loss and accuracy per step (head): the training forward, without gradients, on text that is not trained on."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spectitan import heartbeat
from spectitan.models.readout import Readout
from spectitan.speculators.base import Speculator
from spectitan.types import StateSource, TokenBatch, add_conditional


@torch.no_grad()
def heldout_sums(speculator: Speculator, source: StateSource, batches: Iterable[TokenBatch], readout: Readout) -> tuple[Tensor, Tensor]:
    """Sums over the batches, so that ranks add up: float64 [steps, columns] of Loss.sums, and the counts, float64 [steps, 1].

    Both on the CPU. Works for NextToken too: its one step is the base's own loss.
    """
    device = readout.embedding.weight.device
    sums = torch.zeros(speculator.steps, len(speculator.metrics), dtype=torch.float64)
    counts = torch.zeros(speculator.steps, 1, dtype=torch.float64)
    for batch in batches:
        heartbeat.beat()
        batch = source.begin(batch)
        targets = speculator.align(batch)
        batch, targets = batch.to(device), targets.to(device)
        loss = speculator(batch, source.states(batch), targets, targets.counts, readout)
        sums += loss.sums.double().cpu()
        counts += loss.counts[:, None]
    return sums, counts


def heldout_report(metrics: Sequence[str], sums: Tensor, counts: Tensor) -> dict:
    """{"heldout_loss": [steps], "heldout_accuracy": [steps], ..., "heldout_tokens": supervised tokens of the first step}.

    Losses are in nats per token.
    """
    means = add_conditional(dict(zip(metrics, (sums / counts.clamp_min(1)).T.tolist())))
    return {**{f"heldout_{name}": values for name, values in means.items()}, "heldout_tokens": int(counts[0])}
