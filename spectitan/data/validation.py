"""Held-out text as batches: files that no training shard contains."""

from typing import NamedTuple

from spectitan.config.sections import Data
from spectitan.data.corpus import EmptyDataset, tokenise_held_out
from spectitan.data.loader import collate
from spectitan.data.order import SampleOrder
from spectitan.data.packing import PackedDataset, packed
from spectitan.data.tokenizer import Tokenizer
from spectitan.errors import UserError
from spectitan.types import TokenBatch

_SEED = 0  # the same samples for every run, so that losses can be compared


def check_seq_length(data: Data, max_positions: int) -> None:
    """Raises UserError if a sample is longer than the base's context."""
    if data.seq_length > max_positions:
        raise UserError(f"data.seq_length = {data.seq_length}: the base allows at most {max_positions}")


def check_steps_fit(data: Data, steps: int) -> None:
    """Raises UserError if a speculator's last step has no target in a sample: step k of the first state predicts token k + 2."""
    if data.seq_length < steps + 2:
        given = f"data.seq_length = {data.seq_length}: step {steps} of the speculator would never have a target"
        raise UserError(f"{given}; allowed: at least {steps + 2}")


class HeldOut(NamedTuple):
    """Held-out text."""

    samples: list[PackedDataset]  # of each dataset; what sample_ids count in
    batches: list[TokenBatch]


def build_validation(data: Data, tokenizer: Tokenizer, num_samples: int, micro_batch_size: int) -> list[TokenBatch]:
    """The batches of `read_held_out`."""
    return read_held_out(data, tokenizer, num_samples, micro_batch_size).batches


def read_held_out(data: Data, tokenizer: Tokenizer, num_samples: int, micro_batch_size: int) -> HeldOut:
    """The first `num_samples` held-out samples (fewer if there are not as many) in batches; the last batch may be smaller.

    Empty if num_samples is 0, or if neither data.val_path nor data.holdout says what is held out. Datasets have the shares of
    their sizes, whatever data.weights.

    Raises:
        UserError: as corpus.tokenise_held_out; packing leaves no sample.
    """
    datasets = tokenise_held_out(data, tokenizer) if num_samples > 0 else []
    if not datasets:
        return HeldOut([], [])
    samples = [packed(dataset.shards, data, f"{dataset.name} (held out)") for dataset in datasets]
    sizes = [len(dataset) for dataset in samples]
    if not any(sizes):
        raise EmptyDataset(f"no held-out document has a token to supervise with data.packing = {data.packing}")
    order, num_samples = SampleOrder(sizes, None, _SEED), min(num_samples, sum(sizes))
    batches = [range(first, min(first + micro_batch_size, num_samples)) for first in range(0, num_samples, micro_batch_size)]
    return HeldOut(samples, [collate(samples, [order[i] for i in index], index, data.seq_length) for index in batches])
