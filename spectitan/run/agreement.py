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

    stopping: bool  # one has been asked to stop
    saving: bool  # one has been asked to save
    writing: bool  # one still writes its part of a checkpoint
    targets: Tensor  # int64 [steps], the global count of each step's: what losses are normalised by
    tokens: int  # of the batches, padding left out
    tokens_by_dataset: Tensor  # int64 [datasets], those that may be targets
    sample_hash: int  # of the samples, modulo 2**64


def agree(
    samples: Sequence[TokenBatch], batches: Sequence[TokenBatch], targets: Sequence[Targets], num_datasets: int, *,
    stopping: bool, saving: bool, writing: bool,
) -> Agreement:  # fmt: skip
    """All ranks call it together.

    Args:
        samples: micro-batches as the loader gives them.
        batches: as they are trained on.
        targets: of each batch.
        stopping, saving, writing: this rank.
    """
    counts = sum(target.counts for target in targets)
    sample_hash = sum(hash_keys(0, sample.index, sample.sample_ids).sum() for sample in samples)
    datasets = torch.cat([(batch.sample_ids >> SAMPLE_BITS).repeat_interleave(batch.loss_mask.sum(1)) for batch in batches])
    by_dataset = torch.bincount(datasets, minlength=num_datasets)
    tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
    here = [torch.tensor([stopping, saving, writing, tokens, sample_hash]), counts, by_dataset]
    numbers, counts, by_dataset = utils.sum_over_ranks(torch.cat(here)).split([len(part) for part in here])
    stopping, saving, writing, tokens, sample_hash = numbers.tolist()
    return Agreement(bool(stopping), bool(saving), bool(writing), counts, tokens, by_dataset, sample_hash % 2**64)
