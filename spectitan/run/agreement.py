"""What ranks tell each other before an optimizer step: one sum over them, on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectitan.data.loader import SAMPLE_BITS
from spectitan.distributed import utils
from spectitan.keyed_random import hash_keys
from spectitan.types import Targets, TokenBatch


class Agreement(NamedTuple):
    """The same on all ranks."""

    targets: Tensor  # int64 [steps], the global count of each step's: what losses are normalised by
    flags: tuple[bool, ...]  # whether any rank has raised each
    tokens: int  # of the batches, padding left out
    tokens_by_dataset: Tensor  # int64 [datasets], those that may be targets
    sample_hash: int  # of the samples, modulo 2**64


def agree(
    samples: Sequence[TokenBatch], batches: Sequence[TokenBatch], targets: Sequence[Targets], num_datasets: int, flags: Sequence[bool]
) -> Agreement:
    """All ranks call it together.

    Args:
        samples: micro-batches as the loader gives them.
        batches: as they are trained on.
        targets: of each batch.
        flags: of this rank.
    """
    counts = sum(target.counts for target in targets)
    sample_hash = sum(hash_keys(0, sample.index, sample.sample_ids).sum() for sample in samples)
    datasets = torch.cat([(batch.sample_ids >> SAMPLE_BITS).repeat_interleave(batch.loss_mask.sum(1)) for batch in batches])
    by_dataset = torch.bincount(datasets, minlength=num_datasets)
    tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
    here = [torch.tensor([sample_hash, tokens]), torch.tensor(flags, dtype=torch.int64), counts, by_dataset]
    numbers, raised, counts, by_dataset = utils.sum_over_ranks(torch.cat(here)).split([len(part) for part in here])
    sample_hash, tokens = numbers.tolist()
    return Agreement(counts, tuple(raised.bool().tolist()), tokens, by_dataset, sample_hash % 2**64)
