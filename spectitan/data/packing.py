"""Samples of a dataset: rows of seq_length tokens, filled with documents as data.packing says."""

import logging
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectitan.config.sections import Data
from spectitan.data.cached_folder import open_or_make
from spectitan.data.meta import BrokenFolder, read_meta
from spectitan.data.packing_index import write_index
from spectitan.data.progress import counted
from spectitan.data.shards import Shards

logger = logging.getLogger(__name__)

_VERSION = 2  # of the index; another number, other samples


class Packing(NamedTuple):
    """What decides the samples of given shards."""

    packing: str
    overlong: str
    seq_length: int

    @property
    def folder(self) -> str:
        return "-".join(map(str, ("packing", _VERSION, *self)))


class DocumentPart(NamedTuple):
    """What a sample holds of a document."""

    ids: np.ndarray  # of the whole document
    row: int | None  # its row in the dataset; None: some rows are no documents, and which is not known
    start: int  # its token that the part begins with
    length: int


class PackedDataset:
    """Samples of one dataset, the same in every epoch and for every seed.

    concat: the documents, in their fixed order, are one stream that is cut every seq_length tokens. Every token stands in exactly one
    sample, and only the last one is padded; samples with nothing to supervise are left out. A document that is cut goes on in the next
    sample as a document of its own: of a chat that is cut, the rest of an answer is supervised without what came before it.

    best_fit, document: a sample holds whole documents, several or one, and what is left of it is padding. Of a document that is
    longer than a sample, every seq_length tokens are a document of their own, or the first are all that is used.

    Pickles as its folders, so that worker processes map the files themselves.

    Args:
        check_content: reads all of the index, to see that it is as it was written; else only the files' lengths are looked at.

    Attributes:
        num_tokens: in all samples, padding left out.
        counts: what happened to documents -> how often.
    """

    def __init__(self, shards: Shards, packing: Packing, check_content: bool = False):
        self._shards, self._packing = shards, packing
        folder = shards.folder / packing.folder
        meta = read_meta(folder, check_content)
        try:
            self._samples, self.num_tokens, self.counts = meta["samples"], meta["tokens"], meta["counts"]
            self._cuts, self._rows, self._begins, self._lengths = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray) if name in meta["files"] else None
                for name in ("cuts.npy", "rows.npy", "begins.npy", "lengths.npy")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BrokenFolder(f"{folder}: {error}") from None

    def __reduce__(self):
        return PackedDataset, (self._shards, self._packing)

    def __len__(self) -> int:
        return self._samples

    @property
    def identity(self) -> dict[str, object]:
        """What decides what each sample holds."""
        return {"text": self._shards.folder.name, **self._packing._asdict(), "index": _VERSION}

    @property
    def fingerprint(self) -> str:
        """Of all that decides the samples."""
        return f"{self._shards.folder.name}/{self._packing.folder}"

    @property
    def masked(self) -> bool:
        """Whether any token is kept from being a target."""
        return self._shards.masked

    @property
    def fill(self) -> Fraction:
        """Share of the samples' tokens that are no padding; 0 where there is no sample."""
        return Fraction(self.num_tokens, max(1, self._samples * self._packing.seq_length))

    def read_into(self, sample: int, tokens: np.ndarray, documents: np.ndarray, mask: np.ndarray | None) -> None:
        """Fills [seq_length] arrays.

        Args:
            tokens: int64, the ids; 0 in the padding.
            documents: int64, 0, 1, 2, ... for the parts of documents; -1 in the padding, which is at the end.
            mask: bool, whether the token may be a target; the padding is left as it is. None, if it is not wanted.
        """
        shards, end = self._shards, 0
        for ordinal, (offset, length) in enumerate(self._parts(sample)):
            filled = slice(end, end + length)
            tokens[filled] = shards.read(offset, offset + length)
            documents[filled] = ordinal
            if mask is not None:
                mask[filled] = shards.read_mask(offset, offset + length)
            end += length
        tokens[end:] = 0
        documents[end:] = -1

    def documents(self, sample: int) -> list[DocumentPart]:
        """The parts of documents in a sample, in their order."""
        shards, parts = self._shards, []
        all_rows = not shards.meta.get("dropped") and not shards.meta.get("held_out")
        for offset, length in self._parts(sample):
            document = int(np.searchsorted(shards.offsets, offset, side="right")) - 1
            begin, end = map(int, shards.offsets[document : document + 2])
            parts.append(DocumentPart(shards.read(begin, end), document if all_rows else None, offset - begin, length))
        return parts

    def _parts(self, sample: int) -> list[tuple[int, int]]:
        """Where the parts of documents in a sample begin in all of the ids, and their lengths."""
        if self._packing.packing == "concat":
            return self._cut(sample)
        row = slice(int(self._rows[sample]), int(self._rows[sample + 1]))
        return list(zip(self._begins[row].tolist(), self._lengths[row].tolist()))

    def _cut(self, sample: int) -> list[tuple[int, int]]:
        shards, parts = self._shards, []
        position = (sample if self._cuts is None else int(self._cuts[sample])) * self._packing.seq_length
        end = min(position + self._packing.seq_length, shards.num_tokens)
        row = int(np.searchsorted(shards.stream, position, side="right")) - 1
        while position < end:
            document_begin, document_end = int(shards.stream[row]), int(shards.stream[row + 1])
            length = min(document_end, end) - position
            parts.append((int(shards.offsets[shards.order[row]]) + position - document_begin, length))
            position, row = position + length, row + 1
        return parts


def packed(shards: Shards, data: Data, name: str) -> PackedDataset:
    """The samples of shards, by data.packing, data.overlong and data.seq_length: from the cache, or worked out now.

    Args:
        name: of the dataset, for the log.
    """
    packing = Packing(data.packing, data.overlong, data.seq_length)
    folder = shards.folder / packing.folder

    def open_index(folder: Path) -> PackedDataset | None:
        if not folder.exists():
            return None
        try:
            return PackedDataset(shards, packing, check_content=data.verify == "content")
        except BrokenFolder as error:
            logger.warning("the packing of data %s is broken and is made again: %s", name, error)
            return None

    def write(temporary: Path) -> Path:
        write_index(temporary, shards, *packing)
        return folder

    return open_or_make(shards.folder / "packing.lock", f"data {name}: packing", lambda: folder, open_index, write)


def describe(samples: PackedDataset, data: Data) -> str:
    """One line: samples, how full they are, what happened to documents."""
    parts = [f"{counted(len(samples), 'sample')} of {data.seq_length} tokens ({data.packing}), {float(samples.fill):.2%} of them filled"]
    return ", ".join(parts + [f"{count:,} {what}" for what, count in samples.counts.items()])
