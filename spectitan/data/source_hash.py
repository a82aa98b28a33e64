"""What the files of a dataset hold, as one hash, and whether it can have changed since it was made."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from spectitan import heartbeat
from spectitan.data.documents import Dataset
from spectitan.data.progress import Progress

SETTLED_SECONDS = 60.0  # a file changed more recently might change again without a new time stamp
_BLOCK_BYTES = 2**20
_SHOWN_BYTES = 2**30  # of more than that it is said that they are read
_known: dict[str, str] = {}  # hashes made by this process, by all that the file system says of the files


class SourceHash:
    """A hash of every file's path, size and bytes, made on the side while the same files are read for another purpose: what has just been
    read need not come from the disk again."""

    def __init__(self, dataset: Dataset):
        self._dataset, self._digest, self._read = dataset, hashlib.blake2b(digest_size=16), 0
        self._version, self._settled = _version(dataset), _settled(dataset)
        self._blocks = self._every_block()

    def advance(self, position: int) -> None:
        """Follows a reader that has come to this byte of all the files."""
        while self._read < position and next(self._blocks, None) is not None:
            pass

    def finish(self) -> str:
        """Reads what is left, and returns the hash."""
        for _ in self._blocks:
            pass
        content = self._digest.hexdigest()
        if self._settled:
            _known[self._version] = content
        return content

    def _every_block(self) -> Iterator[int]:
        for file in self._dataset.files:
            path = self._dataset.root / file
            self._digest.update(os.fsencode(file) + b"\0%d\0" % path.stat().st_size)
            with path.open("rb", buffering=0) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    self._digest.update(block)
                    heartbeat.beat()
                    self._read += len(block)
                    yield self._read


def content_hash(dataset: Dataset) -> str:
    """The hash, by reading all of the files; once in a process, as long as the file system says that none has changed."""
    content = _known.get(_version(dataset))
    if content is not None:
        return content
    source, size = SourceHash(dataset), dataset.num_bytes()
    if size > _SHOWN_BYTES:
        with Progress(f"data {dataset.name}: reading the sources, which may have changed (data.verify)", size) as progress:
            for position in range(0, size, _SHOWN_BYTES // 16):
                source.advance(position)
                progress.update(position)
    return source.finish()


class Memory:
    """Hashes by the sizes and time stamps of the files, kept in a folder as the names of empty files: such a file is there or not, also
    after a crash. Files that have just been written are not remembered: they might change again without a new time stamp."""

    def __init__(self, dataset: Dataset, folder: Path):
        stats = [(file, (dataset.root / file).stat()) for file in dataset.files]
        identity = _hashed([str(dataset.root), [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]])
        self._folder, self._prefix, self._settled = folder, f"sources-{identity}-", _settled(dataset)

    def recall(self) -> str | None:
        names = sorted(path.name for path in self._folder.glob(f"{self._prefix}*"))
        return names[0].removeprefix(self._prefix) if names else None

    def keep(self, content: str) -> None:
        """The hash of the files as they were when this object was made."""
        if self._settled and self.recall() != content:
            with contextlib.suppress(OSError):  # of a cache that others write; the content is read anew next time
                for old in self._folder.glob(f"{self._prefix}*"):
                    old.unlink(missing_ok=True)
                (self._folder / f"{self._prefix}{content}").touch()


def names_and_sizes(dataset: Dataset) -> list[tuple[str, int]]:
    return [(file, (dataset.root / file).stat().st_size) for file in dataset.files]


def _version(dataset: Dataset) -> str:
    """Changes whenever a file is written."""
    stats = [(file, (dataset.root / file).stat()) for file in dataset.files]
    values = [(file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for file, stat in stats]
    return _hashed([str(dataset.root), values])


def _settled(dataset: Dataset) -> bool:
    return max((dataset.root / file).stat().st_ctime for file in dataset.files) < time.time() - SETTLED_SECONDS


def _hashed(values: list) -> str:
    return hashlib.blake2b(repr(values).encode(errors="surrogateescape"), digest_size=12).hexdigest()
