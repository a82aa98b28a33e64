"""Hidden states from a store on disk; what is not there comes from the base, or is left out of training."""

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spectitan.data.loader import sample_place
from spectitan.data.packing import PackedDataset
from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.models.readout import Readout
from spectitan.states.adder import StatesAdder
from spectitan.states.cache import FINAL
from spectitan.states.online import OnlineStates
from spectitan.states.precision import decode
from spectitan.states.reader import Reading, StatesReader
from spectitan.states.store import Store, allowed_if_missing
from spectitan.types import BaseStates, TokenBatch

logger = logging.getLogger(__name__)

_AHEAD = 2  # micro-batches whose states are in memory before they are used
_NAMED = 3  # missing samples that a warning names


@dataclass
class _Begun:
    """A micro-batch between `begin` and `states`."""

    batch: TokenBatch  # on the CPU
    places: list  # of each row
    missing: list[int]  # rows
    by_base: bool
    reading: Reading | None = None  # None: the base computes it, or it is not its turn yet


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
        adder: adds to the store; None: nothing is added.
    """

    def __init__(
        self, store: Store, datasets: Sequence[PackedDataset | None], taps: tuple[int, ...], readout: Readout, dtype: torch.dtype,
        device: torch.device, *, online: OnlineStates | None = None, keep: bool = False, on_missing: str = "raise",
    ):  # fmt: skip
        self.store, self.datasets, self.readout, self.dtype, self.device = store, list(datasets), readout, dtype, device
        self.online, self.on_missing = online, on_missing
        self.adder = StatesAdder(store, self.datasets) if keep else None
        layers = [column for column in store.columns if column != FINAL]
        self._taps = [layers.index(tap) for tap in taps]
        self._is_normed = FINAL in store.columns
        final = FINAL if self._is_normed else layers[-1]
        self._reader = StatesReader(store, [store.columns.index(column) for column in (*taps, final)], device)
        self._begun: deque[_Begun] = deque()
        self._counts: Counter = Counter()
        self._ran = self._passed = 0  # micro-batches, and of them those that the base has run on

    # ---- a source of states ----

    def begin(self, batch: TokenBatch) -> TokenBatch:
        if not self._begun:
            self._reader.reuse()
        places, missing, by_base = self._settle(batch)
        if missing and not by_base:
            batch = self._without(batch, missing)
        self._begun.append(_Begun(batch, places, missing, by_base))
        self._read_ahead()
        return self.online.begin(batch) if by_base else batch

    def states(self, batch: TokenBatch) -> BaseStates:
        self._reader.reuse()  # of the micro-batch before: its backward is done
        begun = self._begun.popleft()
        self._passed += 1
        if begun.by_base:
            self._read_ahead()
            self._ran += 1
            states = self.online.states(batch)
            self._counts["generated"] += len(begun.batch.tokens)
            if self.adder is not None and self.adder.failure is None and begun.missing:
                self.adder.add(begun.batch, begun.missing, states)
            return BaseStates(states.final, tuple(states.taps[place] for place in self._taps))
        *taps, final = decode(self._reader.finish(begun.reading), self.dtype)
        self._counts["cached"] += len(begun.reading.reads)
        self._read_ahead()
        return BaseStates(final if self._is_normed else self.readout.final(final), tuple(taps))

    def fill(self, batch: TokenBatch) -> None:
        """Adds to the store what it misses of a batch. All ranks call it together."""
        _, missing, by_base = self._settle(batch)
        if by_base:
            self._begun.append(_Begun(batch, [], missing, by_base))
            self.states(self.online.begin(batch).to(self.device))
        else:
            self._counts["cached"] += len(batch.tokens)

    def base_share(self) -> float:
        """Share of the micro-batches since the last call that the base has run on, 0 to 1."""
        ran, passed, self._ran, self._passed = self._ran, self._passed, 0, 0
        return ran / max(1, passed)

    def take_counts(self) -> dict[str, int]:
        """Samples since the last call, of all ranks, which call it together: "cached" (read from the store), "generated" (by the base),
        "kept" (added to the store), "skipped"."""
        names = ("cached", "generated", "kept", "skipped")
        utils.together(self.drain)  # what is being written counts, too
        if self.adder is not None:
            self._counts["kept"], self.adder.added = self.adder.added, 0
        summed = utils.sum_over_ranks(torch.tensor([self._counts[name] for name in names]))
        self._counts.clear()
        return dict(zip(names, summed.tolist()))

    def drain(self) -> None:
        """Waits until all that is added has been written."""
        if self.adder is not None:
            self.adder.drain()

    def close(self) -> None:
        """Waits for what is being written, and makes it durable.

        Raises:
            OSError: what was added last is not sure to be on the disk.
        """
        self._reader.close()
        if self.adder is not None:
            self.adder.close()

    # ---- what is where ----

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
                allowed = allowed_if_missing(self.store)
                raise UserError(f"no hidden states of {self._named(batch, missing)}: states.on_missing = raise; {allowed}")
            return bool(missing)

        places, missing = [], []
        return places, missing, any(utils.together(find))

    def _read_ahead(self) -> None:
        """Begins to read what is used next."""
        for begun in itertools.islice(self._begun, _AHEAD):
            if begun.reading is None and not begun.by_base:
                begun.reading = self._reader.begin(begun.batch, begun.places)

    def _without(self, batch: TokenBatch, missing: list[int]) -> TokenBatch:
        """The batch with nothing to learn in the missing rows; shapes and order stay."""
        if self.on_missing == "warn":
            logger.warning("skipped, without hidden states: %s", self._named(batch, missing))
        self._counts["skipped"] += len(missing)
        there = torch.ones(len(batch.tokens), 1, dtype=torch.bool)
        there[missing] = False
        return batch._replace(loss_mask=batch.loss_mask & there)

    def _named(self, batch: TokenBatch, rows: list[int]) -> str:
        samples = [sample_place(int(batch.sample_ids[row])) for row in rows[:_NAMED]]
        names = ", ".join(f"sample {sample.sample} of dataset {sample.dataset}" for sample in samples)
        return names + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
