"""The index of a packing: which parts of documents each sample holds. Made once for shards and keys, and kept beside the shards.

    meta.json          "samples", "tokens" (in all of them) and "counts" {what happened to documents: how often}; lengths and checksums of the files
    cuts.npy           int64 [samples], for concatenation: which seq_length tokens of the stream each sample is; all, where there is no such file
    rows.npy           int64 [samples + 1], where each sample's parts begin in the next two; these three not for concatenation
    begins.npy         int64 [parts], where a part begins in all of the ids of the shards
    lengths.npy        int32 [parts], its tokens

While it is made, memory is that of the files' maps, 20 bytes a part (8 a document of a concatenation) and 8 a sample, of which the system
may put out what is not in use.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from spectitan.data.best_fit import Placed, best_fit, one_a_row
from spectitan.data.meta import write_meta
from spectitan.data.order import permuted
from spectitan.data.shards import Shards
from spectitan.keyed_random import hash_keys

_PLANS = {"best_fit": best_fit, "document": one_a_row}
_BLOCK_DOCUMENTS = 2**18  # cut at once
_BLOCK_PARTS = 2**20
_BLOCK_TOKENS = 2**24  # of masks
_ITEM_KEY = 0x17E45A1B  # chooses which of the parts of one length share rows with which others


def write_index(folder: Path, shards: Shards, packing: str, overlong: str, seq_length: int) -> None:
    """Fills an empty folder; everything has reached the disk when this returns."""
    if packing == "concat":
        meta = _concatenation(folder, shards, seq_length)
    else:
        meta = _whole_documents(folder, shards, packing, overlong, seq_length)
    write_meta(folder, meta)


def _concatenation(folder: Path, shards: Shards, seq_length: int) -> dict:
    counts = Counter()
    for start in range(0, len(shards.order), _BLOCK_PARTS):
        bounds = shards.stream[start : start + _BLOCK_PARTS + 1]
        counts["documents split"] += int(np.count_nonzero(bounds[:-1] // seq_length < (bounds[1:] - 1) // seq_length))
    samples, tokens = -(-shards.num_tokens // seq_length), shards.num_tokens
    if shards.masked:
        kept_path = folder / "kept.tmp"
        kept = _new_array(kept_path, bool, samples)
        _find_supervised_cuts(kept, folder / "starts.tmp", shards, seq_length)
        left_out = samples - int(np.count_nonzero(kept))
        if left_out:
            samples -= left_out
            tokens = samples * seq_length - int(kept[-1]) * (-tokens % seq_length)
            counts["samples left out, nothing in them is supervised"] = left_out
            counts["tokens left out with them"] = shards.num_tokens - tokens
            if samples:
                _write_places(_new_array(folder / "cuts.npy", np.int64, samples), kept)
        kept_path.unlink()
    return {"samples": samples, "tokens": tokens, "counts": {what: count for what, count in counts.items() if count}}


def _find_supervised_cuts(kept: np.ndarray, starts_path: Path, shards: Shards, seq_length: int) -> None:
    """Sets `kept`, bool [samples] of zeros, where some seq_length tokens of the stream have one to supervise. Masks are read in the order
    of the files, so that where each document begins in the stream is put in that order first."""
    starts = _new_array(starts_path, np.int64, len(shards.order))
    for first in range(0, len(shards.order), _BLOCK_PARTS):
        block = slice(first, min(first + _BLOCK_PARTS, len(shards.order)))
        starts[shards.order[block]] = shards.stream[block]
    first = 0
    for bounds in _document_bounds(shards, seq_length):
        lengths, start = np.diff(bounds), starts[first : first + len(bounds) - 1]
        first += len(lengths)
        per_document = np.where(lengths, (start + lengths - 1) // seq_length - start // seq_length + 1, 0)
        document, place = _numbered(per_document)
        sample = start[document] // seq_length + place
        to_file = bounds[document] - start[document]  # from a place in the stream to that in the files
        begins = np.maximum(sample * seq_length + to_file, bounds[document])
        ends = np.minimum((sample + 1) * seq_length + to_file, bounds[document + 1])
        kept[sample[_supervised(shards, begins, ends)]] = True
    starts_path.unlink()


def _write_places(output: np.ndarray, kept: np.ndarray) -> None:
    """The places that are set."""
    done = 0
    for start in range(0, len(kept), _BLOCK_PARTS):
        places = start + np.flatnonzero(kept[start : start + _BLOCK_PARTS])
        output[done : done + len(places)] = places
        done += len(places)


def _whole_documents(folder: Path, shards: Shards, packing: str, overlong: str, seq_length: int) -> dict:
    """A counting sort of the parts by length, the longest first; then each goes to the place in a row that the plan gives it."""
    of_length, counts = np.zeros(seq_length + 1, np.int64), Counter()
    for _, lengths in _parts(shards, overlong, seq_length, counts):
        of_length += np.bincount(lengths, minlength=seq_length + 1)
    placed, samples = _PLANS[packing](of_length, seq_length)
    parts, tokens = int(of_length.sum()), int(of_length @ np.arange(seq_length + 1))
    if parts:
        sorted_path = folder / "sorted.tmp"
        _sort(_new_array(sorted_path, np.int64, parts), of_length, _parts(shards, overlong, seq_length, Counter()))
        rows = _new_array(folder / "rows.npy", np.int64, samples + 1)
        output = _new_array(folder / "begins.npy", np.int64, parts), _new_array(folder / "lengths.npy", np.int32, parts)
        _fill(rows, *output, np.load(sorted_path, mmap_mode="r"), of_length, placed)
        sorted_path.unlink()
    return {"samples": samples, "tokens": tokens, "counts": {what: count for what, count in sorted(counts.items()) if count}}


def _parts(shards: Shards, overlong: str, seq_length: int, counts: Counter) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where the parts begin in all of the ids, and their lengths, int64, in blocks, in the order of the ids. They are whole documents,
    and of longer ones every seq_length tokens, or the first. Parts in which nothing can be supervised are left out; `counts` is filled."""
    for bounds in _document_bounds(shards, seq_length):
        lengths = np.diff(bounds)
        longer = lengths > seq_length
        if overlong == "split":
            per_document = -(-lengths // seq_length)
            counts["documents split"] += int(longer.sum())
        else:
            per_document = np.minimum(lengths, 1)
            counts["documents truncated"] += int(longer.sum())
            counts["tokens cut off them"] += int((lengths - seq_length)[longer].sum())
        document, place = _numbered(per_document)
        begins = bounds[document] + place * seq_length
        ends = np.minimum(begins + seq_length, bounds[document + 1])
        kept = _supervised(shards, begins, ends)
        lengths = ends - begins
        counts["documents or parts left out, nothing in them is supervised"] += int((~kept).sum())
        counts["tokens left out with them"] += int(lengths[~kept].sum())
        yield begins[kept], lengths[kept]


def _numbered(per_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For so many parts of each document: the document of each part, and which of its parts it is."""
    document = np.repeat(np.arange(len(per_document)), per_document)
    return document, np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)


def _document_bounds(shards: Shards, seq_length: int) -> Iterator[np.ndarray]:
    """int64 [n + 1], where n consecutive documents begin and the last one ends; in one file, and not many parts together."""
    first, documents = 0, len(shards.order)
    while first < documents:
        bounds = shards.offsets[first : first + _BLOCK_DOCUMENTS + 1]
        limit = min(int(bounds[0]) + _BLOCK_PARTS * seq_length, shards.file_end(int(bounds[0])))
        count = max(1, int(np.searchsorted(bounds, limit, side="right")) - 1)
        yield bounds[: count + 1]
        first += count


def _supervised(shards: Shards, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [parts], of one file: whether a token after a part's first may be a target."""
    supervised = ends - begins > 1
    if not len(begins) or not shards.file_masked(int(begins[0])):
        return supervised
    first = 0
    while first < len(begins):
        stop = max(first + 1, int(np.searchsorted(ends, begins[first] + _BLOCK_TOKENS, side="right")))
        start = int(begins[first])
        mask = np.append(shards.read_mask(start, int(ends[stop - 1])), False)
        spans = np.stack([begins[first:stop] + 1, ends[first:stop]], 1).ravel() - start
        supervised[first:stop] &= np.logical_or.reduceat(mask, spans)[::2]
        first = stop
    return supervised


def _sort(output: np.ndarray, of_length: np.ndarray, parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Puts where parts begin in order of their lengths, the longest first, those of one length as they come."""
    free = np.cumsum(of_length[::-1])[::-1] - of_length  # int64 [seq_length + 1], where the next part of each length goes
    sortable = np.uint16 if len(of_length) <= 2**16 else np.int64  # of 16 bits, numpy counts
    for begins, lengths in parts:
        order = np.argsort(lengths.astype(sortable), kind="stable")
        lengths = lengths[order]
        in_block = np.bincount(lengths, minlength=len(of_length))
        output[free[lengths] + np.arange(len(order)) - (np.cumsum(in_block) - in_block)[lengths]] = begins[order]
        free += in_block


def _fill(
    rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray, sorted_begins: np.ndarray, of_length: np.ndarray, placed: list[Placed]
) -> None:
    """Places the parts. Of one length they are taken in a pseudo-random order, so that neighbours in the files do not share a row."""
    for run in placed:
        rows[1 + run.first_row : 1 + run.first_row + run.rows] += run.each
    _parts_to_begins(rows[1:])  # as a row fills, where its next part goes; full, where it ends
    first_of_length = np.cumsum(of_length[::-1])[::-1] - of_length
    keys = hash_keys(_ITEM_KEY, torch.arange(len(of_length))).tolist()
    for batch in _batches(placed):
        length, count = batch[0].length, sum(run.rows * run.each for run in batch)
        first = int(first_of_length[length])
        items = np.arange(batch[0].first_item - first, batch[0].first_item - first + count, dtype=np.uint64)
        chosen = sorted_begins[first + permuted(items, int(of_length[length]), keys[length] % 2**64).astype(np.int64)]
        done = 0
        for run in batch:
            row = slice(1 + run.first_row, 1 + run.first_row + run.rows)
            places = (rows[row, None] + np.arange(run.each)).ravel()
            begins[places], lengths[places] = chosen[done : done + len(places)], length
            rows[row] += run.each
            done += len(places)


def _parts_to_begins(rows: np.ndarray) -> None:
    """How many parts each row holds -> where it begins, in place."""
    total = 0
    for start in range(0, len(rows), _BLOCK_PARTS):
        block = rows[start : start + _BLOCK_PARTS]
        ends = total + np.cumsum(block)
        total = int(ends[-1])
        block[:] = ends - block


def _batches(placed: list[Placed]) -> Iterator[list[Placed]]:
    """Runs of one length, one after the other, of about so many parts as are held in memory."""
    batch, parts = [], 0
    for run in placed:
        step = max(1, _BLOCK_PARTS // run.each)
        for start in range(0, run.rows, step):
            part = run._replace(
                first_item=run.first_item + start * run.each, first_row=run.first_row + start, rows=min(step, run.rows - start)
            )
            if batch and (part.length != batch[0].length or parts >= _BLOCK_PARTS):
                yield batch
                batch, parts = [], 0
            batch.append(part)
            parts += part.rows * part.each
    if batch:
        yield batch


def _new_array(path: Path, dtype: type, size: int) -> np.ndarray:
    """A .npy file as a map, zeros. It has its room on the disk at once: where a map finds none, the process would be killed."""
    array = np.lib.format.open_memmap(path, "w+", dtype, (size,))
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array.view(np.ndarray)
