"""The files of a cache of hidden states. Any number of processes add to a folder, each to shards of its own.

    meta.json       of the whole cache, see cache.py
    NAME.states     states of sample after sample, as precision.to_bytes gives them
    NAME.index      a line of JSON that says what text the samples are of, then a record for each sample
    NAME.json       written when the shard is whole and on the disk: how many records and bytes it has

A record is appended after its states, and has a checksum of its own, so that a shard can be read while it is written, and after its
writer was killed: what has no whole record is not there. Of a shard that is whole nothing may be missing.
"""

import json
import mmap
import os
import secrets
import zlib
from pathlib import Path

import numpy as np

from spectitan.errors import UserError
from spectitan.files import sync, write_whole

RECORD = np.dtype(
    [
        ("text", "<u4"),  # place in the index's list of texts
        ("tokens", "<u4"),  # of the sample, padding left out
        ("sample", "<i8"),  # its number
        ("offset", "<i8"),  # of its states in NAME.states
        ("ids", "<u8"),  # hash of its token ids and documents
        ("states", "<u4"),  # crc32 of its states
        ("self", "<u4"),  # crc32 of the fields before
    ]
)
SHARD_BYTES = 2**32  # a new shard is begun after so many
_HEADER_BYTES = 2**24  # at most


class DamagedCache(UserError):
    """A file that is not as it was written."""

    def __init__(self, file: Path, problem: str):
        shard = file.with_suffix("")
        super().__init__(f"{file}: {problem}; remove {shard}.*: what was in it is then filled anew, or missing")


class ShardWriter:
    """Appends samples to shards of this process. Nothing is made before the first sample.

    Args:
        folder: exists.
        texts: JSON values that say what the samples are of.
    """

    def __init__(self, folder: Path, texts: list[dict], shard_bytes: int = SHARD_BYTES):
        self._folder, self._texts, self._shard_bytes = folder, texts, shard_bytes
        self._name, self._number = secrets.token_hex(6), 0
        self._states = self._index = None
        self._size = self._records = 0

    def add(self, text: int, sample: int, ids: int, tokens: int, parts: list[np.ndarray]) -> None:
        """A sample's states. If the disk is full, OSError, and the shard is as it was before."""
        if self._states is None:
            self._begin()
        start, checksum = self._size, 0
        try:
            for part in parts:
                checksum = zlib.crc32(part, checksum)
                _write(self._states, part.data)
                self._size += part.nbytes
            record = np.array([(text, tokens, sample, start, ids, checksum, 0)], RECORD)
            record["self"] = zlib.crc32(record.tobytes()[:-4])
            _write(self._index, memoryview(record.tobytes()))
        except OSError:
            self._size = start
            for file, size in ((self._states, start), (self._index, self._index_start + self._records * RECORD.itemsize)):
                file.truncate(size)
                file.seek(size)
            raise
        self._records += 1
        if self._size >= self._shard_bytes:
            self.finish()

    def _begin(self) -> None:
        path = self._folder / f"{self._name}-{self._number:05d}"
        header = json.dumps({"texts": self._texts}).encode() + b"\n"
        self._number, self._index_start, self._size, self._records = self._number + 1, len(header), 0, 0
        try:
            self._states = path.with_suffix(".states").open("xb", buffering=0)
            self._index = path.with_suffix(".index").open("xb", buffering=0)
            _write(self._index, memoryview(header))
        except OSError:
            self._discard()
            raise

    def _discard(self) -> None:
        for file in (self._states, self._index):
            if file is not None:
                file.close()
                Path(file.name).unlink()
        self._states = self._index = None

    def finish(self) -> None:
        """The shard is whole: it reaches the disk, and says so."""
        if self._states is None:
            return
        if not self._records:
            self._discard()
            return
        states, index, self._states, self._index = self._states, self._index, None, None
        for file in (states, index):
            os.fsync(file.fileno())
            file.close()
        write_whole(Path(states.name).with_suffix(".json"), json.dumps({"records": self._records, "bytes": self._size}) + "\n")
        sync(self._folder)


def _write(file, content: memoryview) -> None:
    """All of it: one call writes less where the disk is nearly full."""
    content = content.cast("B")
    while content:
        content = content[file.write(content) :]


class Shard:
    """Reads a shard, whole or still growing.

    Args:
        index: its .index file, whose first line is there.
        token_bytes: of the states of a token.

    Attributes:
        texts: as the writer was given them.
        is_whole: no more will come.
    """

    def __init__(self, index: Path, token_bytes: int):
        self.index, self.states, self._whole = index, index.with_suffix(".states"), index.with_suffix(".json")
        self.is_whole, self._token_bytes, self._map = False, token_bytes, None
        with index.open("rb") as file:
            line = file.readline(_HEADER_BYTES)
        try:
            self.texts = json.loads(line)["texts"]
        except (ValueError, KeyError, TypeError):
            raise DamagedCache(index, "its first line is not what was written") from None
        self._position, self._records = len(line), 0

    @staticmethod
    def has_begun(index: Path) -> bool:
        """Whether the first line is there."""
        with index.open("rb") as file:
            return file.readline(_HEADER_BYTES).endswith(b"\n") or index.with_suffix(".json").exists()

    def follow(self) -> np.ndarray:
        """RECORD [n], those that have come since the last call."""
        promised = self._promised()  # first: what is whole has all its records
        with self.index.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        records = np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)
        size = self.states.stat().st_size
        good = np.array([zlib.crc32(record.tobytes()[:-4]) == record["self"] for record in records], bool)
        good &= records["offset"] + records["tokens"].astype(np.int64) * self._token_bytes <= size
        self._position += records.nbytes
        self._records += len(records)
        if promised is not None:
            if size != promised["bytes"]:
                raise DamagedCache(self.states, f"{size:,} bytes, but it was written with {promised['bytes']:,}")
            if self._records != promised["records"] or not good.all():
                raise DamagedCache(self.index, "records are missing or not as they were written")
            self.is_whole = True
        return records[good]

    def _promised(self) -> dict | None:
        try:
            content = json.loads(self._whole.read_bytes())
            return {"records": int(content["records"]), "bytes": int(content["bytes"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise DamagedCache(self._whole, "not what was written") from None

    def read(self, record: np.void) -> np.ndarray:
        """uint8, the sample's states, a view of the map, once their checksum is right."""
        start = int(record["offset"])
        end = start + int(record["tokens"]) * self._token_bytes
        mapped = self._map  # another thread may forget it
        if mapped is None or len(mapped) < end:
            with self.states.open("rb") as file:
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) < end:
            raise DamagedCache(self.states, f"{len(mapped):,} bytes, but the index says {end:,}")
        raw = np.frombuffer(mapped, np.uint8, end - start, start)
        if zlib.crc32(raw) != record["states"]:
            raise DamagedCache(self.states, f"the states of sample {record['sample']} (byte {start:,}) are not as they were written")
        return raw

    def forget(self) -> None:
        """Lets go of the map, and of the descriptor that it keeps."""
        self._map = None
