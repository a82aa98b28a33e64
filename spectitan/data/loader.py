"""Micro-batches of this rank, without end, from any position of the global order; the whole state is that position."""

import gc
import logging
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from spectitan.config.sections import Data
from spectitan.data.corpus import EmptyDataset, TokenisedDataset, tokenise_training
from spectitan.data.order import Place, SampleOrder, sample_weights
from spectitan.data.packing import PackedDataset, describe, packed
from spectitan.data.tokenizer import Tokenizer
from spectitan.types import TokenBatch

logger = logging.getLogger(__name__)

SAMPLE_BITS = 40  # sample_ids: (dataset << SAMPLE_BITS) + sample


def sample_place(sample_id: int) -> Place:
    """Dataset and sample of one of a batch's sample_ids."""
    return Place(sample_id >> SAMPLE_BITS, sample_id & ((1 << SAMPLE_BITS) - 1))


class MicroBatches(Dataset):
    """TokenBatch of samples i .. i + micro_batch_size - 1 of the global order, for any i."""

    def __init__(self, datasets: list[PackedDataset | None], order: SampleOrder, micro_batch_size: int, seq_length: int):
        self._datasets, self._order, self._micro_batch_size, self._seq_length = datasets, order, micro_batch_size, seq_length

    def __getitem__(self, first: int) -> TokenBatch:
        index = range(first, first + self._micro_batch_size)
        return collate(self._datasets, [self._order[i] for i in index], index, self._seq_length)


def collate(datasets: list[PackedDataset | None], places: list[Place], index: range, seq_length: int) -> TokenBatch:
    """The samples at `places` as a batch; document ids are made unique in it."""
    tokens, documents = np.empty((2, len(places), seq_length), np.int64)
    mask = np.ones((len(places), seq_length), bool)
    for row, place in enumerate(places):
        dataset = datasets[place.dataset]
        dataset.read_into(place.sample, tokens[row], documents[row], mask[row] if dataset.masked else None)
    is_token = documents >= 0
    mask &= is_token
    documents += np.where(is_token, np.arange(len(places))[:, None] * seq_length, 0)
    sample_ids = [(place.dataset << SAMPLE_BITS) + place.sample for place in places]
    rows = (tokens, mask, documents, np.array(index, np.int64), np.array(sample_ids, np.int64))
    return TokenBatch(*map(torch.from_numpy, rows))


class PositionSampler(Sampler[int]):
    """First sample of each micro-batch of one rank: at global position P, micro-batch j of rank r begins at P + (j*R + r)*m.

    Its state is the position, an integer.
    """

    def __init__(self, position: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int):
        self._position, self._global_batch_size = position, global_batch_size
        self._offsets = range(rank * micro_batch_size, global_batch_size, world_size * micro_batch_size)

    def __iter__(self) -> Iterator[int]:
        position = self._position
        while True:
            for offset in self._offsets:
                yield position + offset
            position += self._global_batch_size


class Loader:
    """Endless iterator of this rank's micro-batches.

    Attributes:
        position: samples that whole optimizer steps have consumed over all ranks; with it, build_loader goes on from here.
        samples_per_epoch: samples of all datasets that are used, each once.
        tokenised: the datasets, whole.
        datasets: names, by the number that sample_ids begin with.
        samples: of each of them; None where its weight is 0.
        order: of all samples.
        counts: for each dataset {"documents", "tokens", "supervised" (tokens that may be targets), "longest" (document, in tokens),
            "bytes", "samples", "fill" (share of the samples' tokens that are no padding), "held_out", "kinds": {what rows are: rows},
            "dropped": {reason: documents}, "noted": {what: how often}, "packed": {what: how often}, "skipped": names}.
        reasons: of all datasets together, what was dropped, noted, split or truncated -> how often.
        shares: share of each dataset in the tokens of the samples, padding left out.
        fingerprints: of each dataset's samples: another if the files, the tokenizer, the choice of documents or the packing are; "" for none.
    """

    def __init__(
        self, datasets: list[TokenisedDataset], data: Data, *, seed: int, global_batch_size: int, micro_batch_size: int,
        rank: int, world_size: int, position: int,
    ):  # fmt: skip
        samples = [dataset.shards and _packed(dataset, data) for dataset in datasets]
        sizes = [0 if dataset is None else len(dataset) for dataset in samples]
        tokens = [0 if dataset is None else dataset.num_tokens for dataset in samples]
        weights = data.weights or tokens
        self.position = position
        self.samples_per_epoch = sum(sizes)
        self.tokenised = datasets
        self.datasets, self.samples = [dataset.name for dataset in datasets], samples
        self.counts = {dataset.name: _counts(dataset, of_dataset) for dataset, of_dataset in zip(datasets, samples)}
        self.reasons = _reasons(self.counts.values())
        self.fingerprints = {
            dataset.name: "" if of_dataset is None else of_dataset.fingerprint for dataset, of_dataset in zip(datasets, samples)
        }
        whole = sum(map(Fraction, weights))  # of floats, it could be infinite
        self.shares = {name: float(Fraction(weight) / whole) for name, weight in zip(self.datasets, weights)}
        self._global_batch_size = global_batch_size
        self._micro_batches = global_batch_size // (world_size * micro_batch_size)
        self._handed_out = 0
        self._shared = data.loader_workers > 0 and not torch.cuda.is_available()  # workers' memory; pinned, it is a copy already
        self.order = SampleOrder(sizes, sample_weights(data.weights, sizes, tokens) if data.weights else None, seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital", category=UserWarning)  # torchdata calls it, new PyTorch warns
            batches = StatefulDataLoader(
                MicroBatches(samples, self.order, micro_batch_size, data.seq_length),
                batch_size=None,
                sampler=PositionSampler(position, global_batch_size, micro_batch_size, rank, world_size),
                num_workers=data.loader_workers,
                prefetch_factor=data.prefetch_factor if data.loader_workers else None,
                collate_fn=_as_it_is,
                worker_init_fn=partial(_leave_signals_to, os.getpid()),
                pin_memory=torch.cuda.is_available(),
            )
        if data.loader_workers:
            gc.collect()  # a forked worker that collected this process's garbage would wait for threads that it does not have
        self._batches = iter(batches)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> TokenBatch:
        batch = next(self._batches)
        if self._shared:  # each tensor keeps a descriptor, and a step keeps all of its micro-batches
            batch = TokenBatch(*(tensor if tensor is None else tensor.clone() for tensor in batch))
        self._handed_out += 1
        if self._handed_out == self._micro_batches:
            self._handed_out = 0
            self.position += self._global_batch_size
        return batch


def build_loader(
    data: Data, tokenizer: Tokenizer, *, seed: int, global_batch_size: int, micro_batch_size: int,
    rank: int = 0, world_size: int = 1, position: int = 0,
) -> Loader:  # fmt: skip
    """Tokenises what is not in the cache yet, and serves the training part from `position` of the global order.

    Args:
        seed: of the order of samples.
        global_batch_size: samples of an optimizer step, over all ranks; a multiple of world_size * micro_batch_size.
        position: samples consumed so far over all ranks.

    Raises:
        UserError: as corpus.tokenise_training; a dataset of which no sample is left.
    """
    assert global_batch_size % (world_size * micro_batch_size) == 0, (global_batch_size, world_size, micro_batch_size)
    datasets = tokenise_training(data, tokenizer)
    return Loader(
        datasets, data, seed=seed, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size,
        rank=rank, world_size=world_size, position=position,
    )  # fmt: skip


def _packed(dataset: TokenisedDataset, data: Data) -> PackedDataset:
    samples = packed(dataset.shards, data, dataset.name)
    logger.info("data %s: %s", dataset.name, describe(samples, data))
    if not len(samples):
        what = f"data.packing = {data.packing}, data.overlong = {data.overlong}, data.seq_length = {data.seq_length}"
        raise EmptyDataset(f"data {dataset.name}: empty dataset, no sample of it has a token to supervise ({what})")
    return samples


def _counts(dataset: TokenisedDataset, samples: PackedDataset | None) -> dict:
    counts = {"documents": 0, "tokens": 0, "supervised": 0, "longest": 0, "bytes": 0, "held_out": 0}
    counts |= {"kinds": {}, "dropped": {}, "noted": {}, "skipped": []}
    if samples is None:
        return counts | {"samples": 0, "fill": 0.0, "packed": {}}
    meta = {"supervised": dataset.shards.num_tokens} | dataset.shards.meta
    counts = {name: meta.get(name, nothing) for name, nothing in counts.items()}
    return counts | {"samples": len(samples), "fill": float(samples.fill), "packed": samples.counts}


def _reasons(counts: Iterable[dict]) -> dict[str, int]:
    total = Counter()
    for of_dataset in counts:
        total.update({f"dropped: {reason}": count for reason, count in of_dataset["dropped"].items()})
        total.update(of_dataset["noted"])
        total.update(of_dataset["packed"])
    return dict(sorted(total.items()))


def _as_it_is(batch: TokenBatch) -> TokenBatch:
    return batch


def _leave_signals_to(trainer: int, worker: int) -> None:
    """Ctrl-C and job managers signal whole process groups, but the trainer still needs its workers to end a step and save.

    A worker ends by SIGTERM from the trainer, which is how multiprocessing ends it, and by no one else's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(trainer,), daemon=True).start()


def _end_when_told_by(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
