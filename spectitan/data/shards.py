"""Tokenised documents on disk: flat files of ids, an index of where documents begin, and the fixed order they are packed in.

    meta.json                  what is here: counts, dtype, length and checksum of each file
    tokens-00000.bin, ...      ids of document after document, uint16 or uint32; a document lies in one file
    masks-00000.bin, ...       one bit for each id of that file, 1: it may be a target, first id in the highest bit; where
                               there is no such file, every id may be
    offsets.npy                int64 [documents + 1], where each document begins in all of the ids
    order.npy                  int64 [documents], the documents permuted, once and for all
    stream.npy                 int64 [documents + 1], where each permuted document begins in the stream that samples are cut from
    packing-*/                 indexes of samples, see packing_index.py; not the writer's

Everything is read through memory maps; nothing grows with the corpus but the files.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from spectitan.data.meta import BrokenFolder, read_meta, write_meta
from spectitan.data.order import permuted

FORMAT_VERSION = 3
SHARD_TOKENS = 2**32  # a new file is begun after this many ids: a mapped file keeps a descriptor, of which a process has about 1,000
_INDEX_ROWS = 2**20  # index rows in memory at once
_ORDER_KEY = 0x5EC717A2  # chooses the fixed permutation of documents


class Shards:
    """Reads what ShardWriter wrote. Pickles as its folder, so that worker processes map the files themselves.

    Args:
        check_content: reads all of the files, to see that they are as they were written; else only their lengths are looked at.

    Attributes:
        meta: what the writer was given, with "documents", "tokens", "supervised" (tokens that may be targets) and "longest" (document).
        offsets, order, stream: as in the module's docstring.
        tokens, token_files: the ids of each file, and the files.
        masked: whether any id is kept from being a target.
    """

    def __init__(self, folder: str | Path, check_content: bool = False):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder, check_content)
        try:
            self.offsets, self.order, self.stream = (
                _plain(np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in ("offsets", "order", "stream")
            )
            self.token_files = [self.folder / name for name in sorted(self.meta["files"]) if name.startswith("tokens-")]
            self.tokens = [_map(path, self.meta["dtype"]) for path in self.token_files]
            masks = [path.name.replace("tokens-", "masks-") for path in self.token_files]
            self._masks = [_map(self.folder / name, "u1") if name in self.meta["files"] else None for name in masks]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BrokenFolder(f"{self.folder}: {error}") from None
        self.masked = any(mask is not None for mask in self._masks)
        self._file_starts = np.cumsum([0] + [len(tokens) for tokens in self.tokens]).tolist()

    def __reduce__(self):
        return Shards, (self.folder,)

    @property
    def num_tokens(self) -> int:
        return self._file_starts[-1]

    def _file_of(self, start: int) -> int:
        return bisect_right(self._file_starts, start, hi=len(self.tokens)) - 1

    def file_end(self, start: int) -> int:
        """Where the file ends that the id at `start` is in."""
        return self._file_starts[self._file_of(start) + 1]

    def file_masked(self, start: int) -> bool:
        """Whether some ids of that file may be no targets."""
        return self._masks[self._file_of(start)] is not None

    def read(self, start: int, stop: int) -> np.ndarray:
        """ids [start, stop) of one document, by their place in all of the ids; a view of the map."""
        file = self._file_of(start)
        first = self._file_starts[file]
        return self.tokens[file][start - first : stop - first]

    def read_mask(self, start: int, stop: int) -> np.ndarray | bool:
        """bool [stop - start], whether those ids, of one file, may be targets; True where all of the file may."""
        file = self._file_of(start)
        mask, first = self._masks[file], self._file_starts[file]
        if mask is None:
            return True
        start, stop = start - first, stop - first
        bits = np.unpackbits(mask[start // 8 : (stop + 7) // 8], count=stop - start // 8 * 8)
        return bits[start % 8 :].view(bool)


class ShardWriter:
    """Writes shards into an empty folder, document after document, with constant memory.

    Args:
        folder: exists and is empty.
        vocab_size: ids are below it; decides the dtype.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        self._folder, self._shard_tokens = folder, shard_tokens
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._lengths = (folder / "lengths.tmp").open("wb")
        self._file, self._files, self._in_file, self._mask = None, 0, 0, None
        self.documents = self.tokens = self.supervised = self.longest = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """A document: ids [n], and bool [n] of which may be targets; None: all."""
        if self._file is None or self._in_file >= self._shard_tokens:
            self._close_file()
            self._file = (self._folder / f"tokens-{self._files:05d}.bin").open("wb")
            self._files, self._in_file = self._files + 1, 0
        if mask is not None and self._mask is None:
            self._mask = _BitWriter(self._folder / f"masks-{self._files - 1:05d}.bin")
            self._mask.add_ones(self._in_file)  # what is in the file so far has none
        if self._mask is not None:
            self._mask.add(np.ones(len(ids), bool) if mask is None else mask)
        self._file.write(ids.astype(self._dtype).data)
        self._lengths.write(np.array(len(ids), np.int64).data)
        self._in_file += len(ids)
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)
        self.longest = max(self.longest, len(ids))
        self.supervised += len(ids) if mask is None else int(np.count_nonzero(mask))

    def finish(self, meta: dict) -> None:
        """Writes the index, then meta.json with `meta` in it; everything has reached the disk when this returns."""
        self._close_file()
        self._lengths.close()
        lengths_path = self._folder / "lengths.tmp"
        lengths = np.memmap(lengths_path, np.int64, "r")
        _write_npy(self._folder / "offsets.npy", self.documents + 1, _running_sum(lengths[rows] for rows in _slices(self.documents)))
        _write_npy(self._folder / "order.npy", self.documents, _fixed_order(self.documents))
        order = np.load(self._folder / "order.npy", mmap_mode="r", allow_pickle=False)
        _write_npy(self._folder / "stream.npy", self.documents + 1, _running_sum(lengths[order[rows]] for rows in _slices(self.documents)))
        del lengths, order
        lengths_path.unlink()
        counts = {"documents": self.documents, "tokens": self.tokens, "supervised": self.supervised, "longest": self.longest}
        write_meta(self._folder, meta | counts | {"dtype": self._dtype.str})

    def close(self) -> None:
        """Closes the files of shards that will not be finished."""
        self._close_file()
        self._lengths.close()

    def _close_file(self) -> None:
        for file in (self._file, self._mask):
            if file is not None:
                file.close()
        self._file = self._mask = None


class _BitWriter:
    """A file of bits, eight in a byte, the first in the highest."""

    def __init__(self, path: Path):
        self._file, self._rest = path.open("wb"), np.zeros(0, bool)  # fewer than eight, which wait for the byte's others

    def add(self, bits: np.ndarray) -> None:
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole]).data)
        self._rest = bits[whole:]

    def add_ones(self, count: int) -> None:
        for rows in _slices(count):
            self.add(np.ones(rows.stop - rows.start, bool))

    def close(self) -> None:
        self._file.write(np.packbits(self._rest).data)
        self._file.close()


def _map(path: Path, dtype: str) -> np.ndarray:
    """The content of a file, mapped. Samples lie anywhere in it: reading ahead would fetch many times what is used."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _plain(mapped: np.memmap) -> np.ndarray:
    """The same memory as an array of the base class: slices of a memmap take ten times as long to make."""
    return mapped.view(np.ndarray)


def _slices(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _INDEX_ROWS, size)) for start in range(0, size, _INDEX_ROWS))


def _fixed_order(documents: int) -> Iterator[np.ndarray]:
    for rows in _slices(documents):
        yield permuted(np.arange(rows.start, rows.stop, dtype=np.uint64), documents, _ORDER_KEY)


def _running_sum(lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """0, then the sum of the lengths so far after each."""
    total = 0
    yield np.zeros(1, np.int64)
    for part in lengths:
        sums = total + np.cumsum(part)
        total = int(sums[-1])
        yield sums


def _write_npy(path: Path, size: int, parts: Iterable[np.ndarray]) -> None:
    """int64 [size] from parts. Written as a file, not through a map: with a map a full disk would kill the process."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (size,)})
        for part in parts:
            file.write(part.astype("<i8").data)
