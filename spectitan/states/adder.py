"""Adds hidden states that the base has computed to a cache, in a thread, beside training."""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from spectitan.data.loader import sample_place
from spectitan.data.packing import PackedDataset
from spectitan.states.cache import StatesCache
from spectitan.states.precision import Stored, encode
from spectitan.types import BaseStates, TokenBatch

logger = logging.getLogger(__name__)

_WAITING = 2  # micro-batches in memory until they are written


class StatesAdder:
    """
    Args:
        cache: to add to.
        datasets: what sample_ids count in.

    Attributes:
        failure: why nothing is added any more, or None.
        added: samples.
    """

    def __init__(self, cache: StatesCache, datasets: Sequence[PackedDataset | None]):
        self.failure: OSError | None = None
        self.added = 0
        self._cache, self._files = cache, cache.new_writer(datasets)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="states-writer")
        self._writing: deque[Future] = deque()
        self._kept: set[int] = set()

    def add(self, batch: TokenBatch, rows: Sequence[int], states: BaseStates) -> None:
        """
        Args:
            batch: on the CPU.
            rows: of it, that are added.
            states: of all of it; taps are the cache's layers.
        """
        if len(self._writing) >= _WAITING:
            wait([self._writing[-_WAITING]])  # not its result, which `drain` looks at with all ranks
        stored = encode((*states.taps, states.final), self._cache.dtype)
        copied = None
        if stored.numbers.is_cuda:
            stored, copied = Stored(*(tensor if tensor is None else _to_pinned(tensor) for tensor in stored)), torch.cuda.Event()
            copied.record()
        self._writing.append(self._thread.submit(self._write, batch, rows, stored, copied))

    def _write(self, batch: TokenBatch, rows: Sequence[int], stored: Stored, copied: "torch.cuda.Event | None") -> None:
        """In a thread of its own."""
        if copied is not None:
            copied.synchronize()
        tokens, documents, ids = batch.tokens.numpy(), batch.document_ids.numpy(), batch.sample_ids.tolist()
        for row in rows:
            if self.failure is not None or ids[row] in self._kept:
                continue
            length = int(np.count_nonzero(documents[row] >= 0))
            sample = sample_place(ids[row])
            states = Stored(*(tensor if tensor is None else tensor[:, row, :length] for tensor in stored))
            try:
                self._files.add(sample.dataset, sample.sample, tokens[row, :length], documents[row, :length], states)
            except OSError as error:
                self.failure = error
                logger.warning("hidden states are cached no more, training goes on without: %s: %s", self._cache.folder, error.strerror)
                return
            self._kept.add(ids[row])
            self.added += 1

    def drain(self) -> None:
        """Waits until all has been written."""
        while self._writing:
            self._writing.popleft().result()

    def close(self) -> None:
        """Makes durable what was added.

        Raises:
            OSError: what was added last is not sure to be on the disk.
        """
        try:
            self.drain()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._files.close()


def _to_pinned(tensor: Tensor) -> Tensor:
    """On the host, which does not wait for the copy."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
