"""Our own cache of hidden states: a folder that any number of runs and processes read and fill.

meta.json says whose states these are and how they are stored; cache_files.py describes the other files. A sample is known by its number
in its dataset, and by what decides that number: the tokenised text, and how it is packed.
"""

import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectitan.data.packing import PackedDataset
from spectitan.errors import UserError
from spectitan.files import naming, read_json
from spectitan.states.cache_files import SHARD_BYTES, DamagedCache, Shard, ShardWriter
from spectitan.states.precision import DTYPES, Stored, bytes_per_token, copy_bytes, first_bad, to_bytes

logger = logging.getLogger(__name__)

FINAL = -1  # among layer ids: the final state, after the final norm
FORMAT = 1  # of the folder
_META = "meta.json"
_MAPPED = 200  # shards at once: each keeps a descriptor, of which a process has about 1,000


class Place(NamedTuple):
    """Where a sample's states are."""

    shard: Shard
    record: np.void


class StatesCache:
    """Reads a cache, and adds to it.

    Args:
        folder: has a meta.json, or will have when something is added.
        base: the base's fingerprint.
        columns: layer ids of the states of a token, as they are stored: ascending, then FINAL.
        hidden_size, dtype: of each of them; a name in precision.DTYPES.

    Attributes:
        remedy: see Store.
        dtype: of the stored numbers.
        token_bytes: that a token takes.
    """

    remedy = "fill it (spectitan.prepare --prepare.states true, or states.source = hybrid)"

    def __init__(
        self, folder: Path, base: str, columns: tuple[int, ...], hidden_size: int, dtype: str, shard_bytes: int = SHARD_BYTES
    ):  # fmt: skip
        self._meta = {"format": FORMAT, "base": base, "columns": list(columns), "hidden_size": hidden_size, "dtype": dtype}
        self.folder, self.columns, self.hidden_size, self.dtype = folder, columns, hidden_size, DTYPES[dtype]
        self.token_bytes, self._shard_bytes = bytes_per_token(len(columns), hidden_size, self.dtype), shard_bytes
        self._shards: dict[Path, Shard] = {}
        self._places: dict[tuple[int, int], Place] = {}
        self._texts: dict[str, int] = {}
        self._mapped: dict[Shard, None] = {}  # the last used last
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        """Samples in it."""
        return len(self._places)

    @property
    def texts(self) -> list[dict]:
        """What its samples are of, as PackedDataset.identity has it."""
        return [json.loads(text) for text in self._texts]

    def refresh(self) -> None:
        """Learns of what this and other processes have added.

        Raises:
            DamagedCache: a shard that is not as it was written.
        """
        for index in sorted(self.folder.glob("*.index")):
            try:
                self._follow(index)
            except FileNotFoundError as error:
                if index.with_suffix(".json").exists():
                    raise DamagedCache(Path(error.filename), "it is gone") from None
                self._drop(index)  # another process has just discarded it, for nothing came to be in it

    def _follow(self, index: Path) -> None:
        shard = self._shards.get(index)
        if shard is None:
            if not Shard.has_begun(index):
                return
            shard = self._shards[index] = Shard(index, self.token_bytes)
        if shard.is_whole:
            return
        texts = [self._texts.setdefault(_as_key(text), len(self._texts)) for text in shard.texts]
        for record in shard.follow():
            if record["text"] < len(texts):
                self._places[texts[record["text"]], int(record["sample"])] = Place(shard, record)

    def _drop(self, index: Path) -> None:
        shard = self._shards.pop(index, None)
        self._places = {key: place for key, place in self._places.items() if place.shard is not shard}

    def count(self, dataset: PackedDataset) -> int:
        """Samples of a dataset in it."""
        number = self._texts.get(_as_key(dataset.identity))
        return sum(text == number for text, _ in self._places)

    def find(self, dataset: PackedDataset, sample: int) -> Place | None:
        return self._places.get((self._texts.get(_as_key(dataset.identity)), sample))

    def read(self, place: Place, tokens: np.ndarray, documents: np.ndarray, taken: list[int], row: int, into: Stored) -> None:
        """Copies a sample's states into a row of a batch.

        Args:
            tokens, documents: int64 [seq], of that row; -1 in `documents` is padding.
            taken: places in `columns` of what `into` takes.
            into: [len(taken), batch, seq, ...], on the CPU.

        Raises:
            DamagedCache: the states are not as they were written, or not finite.
            UserError: they are of other token ids.
        """
        if place.record["ids"] != sample_hash(tokens, documents):
            raise UserError(
                f"{place.shard.states}: sample {place.record['sample']} has other token ids here than in the dataset; allowed: the data "
                "that it was filled from, or another states.hidden_states_path"
            )
        self._limit_maps(place.shard)
        copy_bytes(place.shard.read(place.record), len(self.columns), taken, row, into)
        length = int(place.record["tokens"])
        for index, column in enumerate(taken):
            part = Stored(*(tensor if tensor is None else tensor[index : index + 1, row, :length] for tensor in into))
            bad = first_bad(part)
            if bad is not None:
                where = _name(self.columns[column])
                raise DamagedCache(place.shard.states, f"sample {place.record['sample']}: {where} at token {bad[1]} is not finite")

    def _limit_maps(self, shard: Shard) -> None:
        """Of many shards only the last ones used stay mapped."""
        with self._lock:
            self._mapped[shard] = self._mapped.pop(shard, None)
            if len(self._mapped) > _MAPPED:
                oldest = next(iter(self._mapped))
                del self._mapped[oldest]
                oldest.forget()

    def new_writer(self, datasets: Sequence[PackedDataset | None]) -> "CacheWriter":
        """Adds samples of these datasets, in shards of its own. A cache that is not there yet is made.

        Raises:
            UserError: meanwhile another process has made another one there.
        """
        if not (self.folder / _META).exists():
            _write_first(self.folder, self._meta)
        if _read_meta(self.folder) != self._meta:
            raise UserError(f"{self.folder}: another process has just made a cache of other states there; allowed: another folder")
        return CacheWriter(self, datasets, self._shard_bytes)


class CacheWriter:
    """Adds to a cache, which knows of it at its next `refresh`. See StatesCache.new_writer."""

    def __init__(self, cache: StatesCache, datasets: Sequence[PackedDataset | None], shard_bytes: int):
        self._columns, self._dtype = cache.columns, cache.dtype
        self._shards = ShardWriter(cache.folder, [dataset.identity if dataset else {} for dataset in datasets], shard_bytes)

    def add(self, dataset: int, sample: int, tokens: np.ndarray, documents: np.ndarray, states: Stored) -> None:
        """Appends a sample.

        Args:
            dataset: its place in the list of datasets.
            tokens, documents: int64 [seq], padding left out.
            states: [columns, seq, ...], on the CPU.

        Raises:
            UserError: a state that is not finite.
            OSError: the disk is full; what was added before stays.
        """
        bad = first_bad(states)
        if bad is not None:
            column, token = self._columns[bad[0]], bad[1]
            dtype = str(self._dtype).removeprefix("torch.")
            raise UserError(
                f"sample {sample} of dataset {dataset}: {_name(column)} at token {token} is not finite as {dtype}, and is not cached; "
                "allowed: a sound base; states.dtype = bfloat16 or float32 where float16 is too narrow"
            )
        self._shards.add(dataset, sample, sample_hash(tokens, documents), len(tokens), to_bytes(states))

    def close(self) -> None:
        """What was added is on the disk, and stays."""
        self._shards.finish()


def _as_key(text: dict) -> str:
    return json.dumps(text, sort_keys=True)


def _name(column: int) -> str:
    return "the final state" if column == FINAL else f"the state of layer {column}"


def sample_hash(tokens: np.ndarray, documents: np.ndarray) -> int:
    """64 bits of a sample's token ids and of where its documents begin; padding is left out."""
    length = int(np.count_nonzero(documents >= 0))
    digest = hashlib.sha256(np.ascontiguousarray(tokens[:length]))
    digest.update(documents[:length] - documents[0])
    return int.from_bytes(digest.digest()[:8], "little")


def open_cache(
    folder: Path, *, base: str, layers: tuple[int, ...], hidden_size: int, dtype: str, make: bool, allow_other: bool = False
) -> StatesCache:
    """Opens the cache in a folder, once it is known to hold what is asked for.

    Args:
        base: the base's fingerprint.
        layers: layer ids that are read beside the final state, ascending. The cache may have others too.
        dtype: of a cache that is made or added to.
        make: it may be made, and added to.
        allow_other: of another base, too.

    Raises:
        UserError: no cache, or one of another base, other layers, another hidden size or dtype; damaged files.
    """
    if not (folder / _META).exists():
        if not make:
            raise UserError(
                f"states.hidden_states_path = {str(folder)!r}: no hidden states there; allowed: a folder that "
                "spectitan.prepare --prepare.states true, or a run with states.source = hybrid, has filled"
            )
        return StatesCache(folder, base, (*layers, FINAL), hidden_size, dtype)
    found = _read_meta(folder)
    if found["base"] != base and not allow_other:
        raise UserError(
            f"{folder}: hidden states of another base (fingerprint {found['base'][:12]}) than base.path, whose fingerprint is {base[:12]}; "
            "allowed: its own base, another states.hidden_states_path, or base.allow_other = true"
        )
    missing = sorted(set(layers) - set(found["columns"]))
    if missing:
        listed = [column for column in found["columns"] if column != FINAL]
        raise UserError(
            f"{folder}: hidden states of layers {listed}, and the speculator reads {list(layers)}; allowed: "
            "speculator.target_layer_ids among those, or another states.hidden_states_path"
        )
    if found["hidden_size"] != hidden_size:
        raise UserError(f"{folder}: hidden_size = {found['hidden_size']}; the base's is {hidden_size}")
    if make and found["dtype"] != dtype:
        raise UserError(f"states.dtype = {dtype}: {folder} has {found['dtype']}; allowed: that, or another states.hidden_states_path")
    return StatesCache(folder, found["base"], tuple(found["columns"]), hidden_size, found["dtype"])


def _read_meta(folder: Path) -> dict:
    found = read_json(folder / _META)
    try:
        known = found["format"] == FORMAT and found["dtype"] in DTYPES and isinstance(found["base"], str)
        known &= all(type(column) is int for column in found["columns"]) and type(found["hidden_size"]) is int
    except (KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{folder / _META}: not what this version of spectitan writes; allowed: format {FORMAT}")
    return found


def _write_first(folder: Path, meta: dict) -> None:
    """Writes meta.json, unless another process has done so meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_META}.{secrets.token_hex(8)}.tmp"
    try:
        with naming(folder / _META):
            temporary.write_text(json.dumps(meta, indent=1) + "\n")
        try:
            os.link(temporary, folder / _META)
        except FileExistsError:
            pass
        except OSError:  # a file system without links: of two processes the last one wins, mostly with the same
            temporary.replace(folder / _META)
    finally:
        temporary.unlink(missing_ok=True)
