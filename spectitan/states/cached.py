"""Hidden states from a store on disk; what is not there comes from the base, or is left out of training."""

import itertools
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spectitan.data.loader import sample_place
from spectitan.data.packing import PackedDataset
from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.models.readout import Readout
from spectitan.states.cache import FINAL
from spectitan.states.online import OnlineStates
from spectitan.states.precision import Stored, decode, encode
from spectitan.types import BaseStates, TokenBatch, to_device

logger = logging.getLogger(__name__)

FILL_IT = "allowed: fill it (spectitan.prepare --prepare.states true, or states.source = hybrid), or states.on_missing = skip or warn"
_AHEAD = 2  # micro-batches whose states are in memory before they are used, or until they are written
_NAMED = 3  # missing samples that a warning names


class Store(Protocol):
    """Hidden states of samples."""

    folder: Path
    columns: tuple[int, ...]  # layer ids of a token's states, ascending, and FINAL
    hidden_size: int
    dtype: torch.dtype  # of the numbers, int8 with scales

    def refresh(self) -> None:
        """Learns of what has been added."""

    def find(self, dataset: PackedDataset, sample: int) -> object | None:
        """Where a sample's states are; None: nowhere."""

    def read(self, place: object, tokens: np.ndarray, documents: np.ndarray, taken: list[int], row: int, into: Stored) -> None:
        """See StatesCache.read."""


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


@dataclass
class _Begun:
    """A micro-batch between `begin` and `states`."""

    batch: TokenBatch  # on the CPU
    places: list  # of each row
    missing: list[int]  # rows
    by_base: bool
    buffer: _Buffer | None = None  # None: the base computes it, or it is not its turn yet
    reads: list[Future] = field(default_factory=list)


class CachedStates:
    """The states of a frozen base, from disk.

    What is missing is settled in `begin`: with `online`, the base computes the micro-batch, on all ranks together if one of them misses
    a sample; without it, missing samples are supervised no more, or are refused.

    Args:
        store: of the states.
        datasets: what sample_ids count in.
        taps: layer ids that the speculator reads.
        readout: norms a final state that is stored before the norm.
        dtype, device: of the states that are given.
        online: gives states of the store's layers; None: there is no base.
        keep: what `online` computes is added to the store, a StatesCache.
        on_missing: skip, warn or raise, without `online`.

    Attributes:
        keep: as given; False once something could not be written.
        failure: why not.
        counts: samples "cached" (read from the store), "generated" (by the base), "kept" (added to the store), "skipped".
    """

    def __init__(
        self, store: Store, datasets: Sequence[PackedDataset | None], taps: tuple[int, ...], readout: Readout, dtype: torch.dtype,
        device: torch.device, *, online: OnlineStates | None = None, keep: bool = False, on_missing: str = "raise",
    ):  # fmt: skip
        self.store, self.datasets, self.readout, self.dtype, self.device = store, list(datasets), readout, dtype, device
        self.online, self.keep, self.on_missing = online, keep, on_missing
        self.counts: Counter = Counter()
        self.failure: OSError | None = None
        layers = [column for column in store.columns if column != FINAL]
        self._taps = [layers.index(tap) for tap in taps]
        self._is_normed = FINAL in store.columns
        self._taken = [store.columns.index(column) for column in (*taps, FINAL if self._is_normed else layers[-1])]
        self._readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="states")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="states-writer")
        self._writing: deque[Future] = deque()
        self._begun: deque[_Begun] = deque()
        self._free: list[_Buffer] = []
        self._used: list[_Buffer] = []
        self._kept: set[int] = set()
        self._adding = store.new_writer(self.datasets) if keep else None
        self._ran = self._passed = 0  # micro-batches, and of them those that the base has run on

    # ---- a source of states ----

    def begin(self, batch: TokenBatch) -> TokenBatch:
        if not self._begun:
            self._free, self._used = self._free + self._used, []
        places, missing, by_base = self._settle(batch)
        if missing and not by_base:
            batch = self._without(batch, missing)
        self._begun.append(_Begun(batch, places, missing, by_base))
        self._read_ahead()
        return self.online.begin(batch) if by_base else batch

    def states(self, batch: TokenBatch) -> BaseStates:
        self._free, self._used = self._free + self._used, []  # of the micro-batch before: its backward is done
        begun = self._begun.popleft()
        self._passed += 1
        if begun.by_base:
            self._read_ahead()
            self._ran += 1
            states = self.online.states(batch)
            self.counts["generated"] += len(begun.batch.tokens)
            if self.keep and begun.missing:
                self._add(begun, states)
            return BaseStates(states.final, tuple(states.taps[place] for place in self._taps))
        for read in begun.reads:
            read.result()
        self.counts["cached"] += len(begun.reads)
        *taps, final = decode(begun.buffer.on_device(), self.dtype)
        self._used.append(begun.buffer)
        self._read_ahead()
        return BaseStates(final if self._is_normed else self.readout.final(final), tuple(taps))

    def fill(self, batch: TokenBatch) -> None:
        """Adds to the store what it misses of a batch. All ranks call it together."""
        _, missing, by_base = self._settle(batch)
        if by_base:
            self._begun.append(_Begun(batch, [], missing, by_base))
            self.states(self.online.begin(batch).to(self.device))
        else:
            self.counts["cached"] += len(batch.tokens)

    def base_share(self) -> float:
        """Share of the micro-batches since the last call that the base has run on, 0 to 1."""
        ran, passed, self._ran, self._passed = self._ran, self._passed, 0, 0
        return ran / max(1, passed)

    def take_counts(self) -> dict[str, int]:
        """`counts` since the last call, of all ranks, which call it together."""
        names = ("cached", "generated", "kept", "skipped")
        utils.together(self.drain)  # the writer counts, too
        summed = utils.sum_over_ranks(torch.tensor([self.counts[name] for name in names]))
        self.counts.clear()
        return dict(zip(names, summed.tolist()))

    def close(self) -> None:
        """Waits for what is being written, and makes it durable.

        Raises:
            OSError: what was added last is not sure to be on the disk.
        """
        try:
            self.drain()
        finally:
            for pool in (self._readers, self._writer):
                pool.shutdown(cancel_futures=True)
            if self._adding is not None:
                self._adding.close()

    # ---- reading ----

    def _settle(self, batch: TokenBatch) -> tuple[list, list[int], bool]:
        """Where each row's states are, the rows that have none, and whether the base runs: on one rank means on all."""
        places, missing, anywhere = self._find(batch, self.drain)  # of the step before
        if anywhere and self.online is not None:
            places, missing, anywhere = self._find(batch, self.store.refresh)  # all ranks have drained
        return places, missing, anywhere and self.online is not None

    def _find(self, batch: TokenBatch, before: Callable[[], None]) -> tuple[list, list[int], bool]:
        """Where each row's states are, after `before`; the rows that have none, and whether a rank has such rows.

        What fails on one rank fails on all of them: none waits for it.
        """

        def find() -> bool:
            before()
            samples = map(sample_place, batch.sample_ids.tolist())
            places.extend(self.store.find(self.datasets[sample.dataset], sample.sample) for sample in samples)
            missing.extend(row for row, place in enumerate(places) if place is None)
            if missing and self.online is None and self.on_missing == "raise":
                raise UserError(f"no hidden states of {self._named(batch, missing)}: states.on_missing = raise; {FILL_IT}")
            return bool(missing)

        places, missing = [], []
        return places, missing, any(utils.together(find))

    def _read_ahead(self) -> None:
        """Begins to read what is used next."""
        for begun in itertools.islice(self._begun, _AHEAD):
            if begun.buffer is None and not begun.by_base:
                self._read(begun)

    def _read(self, begun: _Begun) -> None:
        batch = begun.batch
        shape = (len(self._taken), *batch.tokens.shape, self.store.hidden_size)
        buffer = next((buffer for buffer in self._free if buffer.host.numbers.shape == shape), None)
        if buffer is None:
            buffer = _Buffer(shape, self.store.dtype, self.device)
        else:
            self._free.remove(buffer)
            buffer.wait()
        tokens, documents = batch.tokens.numpy(), batch.document_ids.numpy()
        lengths = (batch.document_ids >= 0).sum(1).tolist()
        begun.buffer = buffer
        for row, (place, length) in enumerate(zip(begun.places, lengths)):
            buffer.clear(row, 0 if place is None else length)
            if place is not None:
                read = self._readers.submit(self.store.read, place, tokens[row], documents[row], self._taken, row, buffer.host)
                begun.reads.append(read)

    def _without(self, batch: TokenBatch, missing: list[int]) -> TokenBatch:
        """The batch with nothing to learn in the missing rows; shapes and order stay."""
        if self.on_missing == "warn":
            logger.warning("skipped, without hidden states: %s", self._named(batch, missing))
        self.counts["skipped"] += len(missing)
        there = torch.ones(len(batch.tokens), 1, dtype=torch.bool)
        there[missing] = False
        return batch._replace(loss_mask=batch.loss_mask & there)

    def _named(self, batch: TokenBatch, rows: list[int]) -> str:
        samples = [sample_place(int(batch.sample_ids[row])) for row in rows[:_NAMED]]
        names = ", ".join(f"sample {sample.sample} of dataset {sample.dataset}" for sample in samples)
        return names + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")

    # ---- adding ----

    def _add(self, begun: _Begun, states: BaseStates) -> None:
        if len(self._writing) >= _AHEAD:
            wait([self._writing[-_AHEAD]])  # not its result, which `drain` looks at with all ranks
        stored = encode((*states.taps, states.final), self.store.dtype)
        copied = None
        if self.device.type == "cuda":
            stored, copied = Stored(*(tensor if tensor is None else _to_pinned(tensor) for tensor in stored)), torch.cuda.Event()
            copied.record()
        self._writing.append(self._writer.submit(self._write, begun, stored, copied))

    def _write(self, begun: _Begun, stored: Stored, copied: "torch.cuda.Event | None") -> None:
        """In a thread of its own."""
        if copied is not None:
            copied.synchronize()
        tokens, documents, ids = begun.batch.tokens.numpy(), begun.batch.document_ids.numpy(), begun.batch.sample_ids.tolist()
        for row in begun.missing:
            if not self.keep or ids[row] in self._kept:
                continue
            length = int(np.count_nonzero(documents[row] >= 0))
            sample = sample_place(ids[row])
            states = Stored(*(tensor if tensor is None else tensor[:, row, :length] for tensor in stored))
            try:
                self._adding.add(sample.dataset, sample.sample, tokens[row, :length], documents[row, :length], states)
            except OSError as error:
                self.keep, self.failure = False, error
                logger.warning("hidden states are cached no more, training goes on without: %s: %s", self.store.folder, error.strerror)
                return
            self._kept.add(ids[row])
            self.counts["kept"] += 1

    def drain(self) -> None:
        """Waits until all has been written."""
        while self._writing:
            self._writing.popleft().result()


def _to_pinned(tensor: Tensor) -> Tensor:
    """On the host, which does not wait for the copy."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
