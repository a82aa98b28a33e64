"""Reads the hidden states of micro-batches from a store, in threads, into memory that is used again."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from spectitan.states.precision import Stored
from spectitan.states.store import Store
from spectitan.types import TokenBatch, to_device


class _Buffer:
    """Memory for the states of a micro-batch: pinned where they go to a GPU, and used again when they have been trained on."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        pinned = device.type == "cuda"
        scales = torch.empty(shape[:-1], pin_memory=pinned) if dtype == torch.int8 else None
        self.host = Stored(torch.empty(shape, dtype=dtype, pin_memory=pinned), scales)
        self._device, self._copied = device, torch.cuda.Event() if pinned else None

    def clear(self, row: int, length: int) -> None:
        """What follows the first tokens of a row becomes 0."""
        for tensor in self.host:
            if tensor is not None:
                tensor[:, row, length:] = 0

    def on_device(self) -> Stored:
        stored = Stored(*(tensor if tensor is None else to_device(tensor, self._device) for tensor in self.host))
        if self._copied is not None:
            self._copied.record()
        return stored

    def wait(self) -> None:
        """Until it may be written to."""
        if self._copied is not None:
            self._copied.synchronize()


class Reading(NamedTuple):
    """A micro-batch whose states are on their way."""

    buffer: _Buffer
    reads: list[Future]  # of each row that has states


class StatesReader:
    """
    Args:
        store: to read from.
        columns: places in store.columns of what is read.
        device: that states go to.
    """

    def __init__(self, store: Store, columns: Sequence[int], device: torch.device):
        self._store, self._columns, self._device = store, list(columns), device
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="states")
        self._free: list[_Buffer] = []
        self._used: list[_Buffer] = []

    def begin(self, batch: TokenBatch, places: Sequence[object | None]) -> Reading:
        """
        Args:
            batch: on the CPU.
            places: of each row, as the store finds them; None: its states are 0.
        """
        buffer, reads = self._take((len(self._columns), *batch.tokens.shape, self._store.hidden_size)), []
        tokens, documents = batch.tokens.numpy(), batch.document_ids.numpy()
        lengths = (batch.document_ids >= 0).sum(1).tolist()
        for row, (place, length) in enumerate(zip(places, lengths)):
            buffer.clear(row, 0 if place is None else length)
            if place is not None:
                read = self._threads.submit(self._store.read, place, tokens[row], documents[row], self._columns, row, buffer.host)
                reads.append(read)
        return Reading(buffer, reads)

    def finish(self, reading: Reading) -> Stored:
        """Waits for the states, which are good until `reuse`; what failed is raised."""
        for read in reading.reads:
            read.result()
        self._used.append(reading.buffer)
        return reading.buffer.on_device()

    def reuse(self) -> None:
        """What was given has been trained on: its memory may be written to."""
        self._free, self._used = self._free + self._used, []

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _take(self, shape: tuple[int, ...]) -> _Buffer:
        buffer = next((buffer for buffer in self._free if buffer.host.numbers.shape == shape), None)
        if buffer is None:
            return _Buffer(shape, self._store.dtype, self._device)
        self._free.remove(buffer)
        buffer.wait()
        return buffer
