"""Evaluation prompts must not be in the training data: documents that share 64 consecutive tokens with one are found here."""

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from spectitan.data.shards import Shards

WINDOW = 64
_HALF = WINDOW // 2
_AT_ONCE = 2**18  # windows of a document that are looked at together: their hashes take 30 times the memory of its ids
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token's part of a hash is lost by overflow


class PromptWindows:
    """Every window of 64 consecutive tokens of the prompts. A prompt shorter than that has none."""

    def __init__(self, prompts: Iterable[Sequence[int]]):
        arrays = [np.asarray(prompt, dtype=np.uint64) for prompt in prompts]
        self._windows = {ids[i : i + WINDOW].tobytes() for ids in arrays for i in range(len(ids) - WINDOW + 1)}
        self._hashes = np.unique(np.concatenate([_window_hashes(ids) for ids in arrays] or [np.zeros(0, np.uint64)]))

    def overlap(self, ids: np.ndarray) -> bool:
        """Whether the ids [n] contain one of the windows."""
        if not len(self._hashes) or len(ids) < WINDOW:
            return False
        starts = range(0, len(ids) - WINDOW + 1, _AT_ONCE)
        return any(self._overlap(ids[start : start + _AT_ONCE + WINDOW - 1].astype(np.uint64)) for start in starts)

    def _overlap(self, ids: np.ndarray) -> bool:
        hashes = _window_hashes(ids)
        nearest = self._hashes[np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)]
        return any(ids[i : i + WINDOW].tobytes() in self._windows for i in np.flatnonzero(nearest == hashes))


def _window_hashes(ids: np.ndarray) -> np.ndarray:
    """uint64 [max(0, n - 63)]: sum over a window of (id + 1) * _BASE**(63 - place), modulo 2**64, by doubling the window."""
    if len(ids) < WINDOW:
        return np.zeros(0, np.uint64)
    hashes, width, power = ids + np.uint64(1), 1, _BASE
    while width < WINDOW:
        hashes = hashes[:-width] * power + hashes[width:]
        width, power = 2 * width, np.uint64(int(power) ** 2 % 2**64)
    return hashes


def count_overlap(corpus: Iterable[Shards], prompts: Iterable[Sequence[int]]) -> int:
    """Prompts of which some 64 consecutive tokens stand in the shards: 0 is what training data should have.

    Checks the filter by other means: each window of 64 holds one of the prompt's 32-token blocks (those from places 0, 32, 64, ...),
    so the files are searched for the bytes of every block, and a hit is compared to both sides.
    """
    files = [(path, tokens) for shards in corpus for path, tokens in zip(shards.token_files, shards.tokens)]
    return sum(any(_file_has(path, tokens, list(prompt)) for path, tokens in files) for prompt in prompts)


def _file_has(path: Path, tokens: np.ndarray, prompt: list[int]) -> bool:
    limit = np.iinfo(tokens.dtype).max
    if len(prompt) < WINDOW or max(prompt) > limit:
        return False
    ids = np.asarray(prompt, dtype=tokens.dtype)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start in range(0, len(ids) - _HALF + 1, _HALF):
            block = ids[start : start + _HALF].tobytes()
            found = content.find(block)
            while found >= 0:
                place, rest = divmod(found, tokens.itemsize)
                if rest == 0 and _common_run(tokens, place, ids, start) >= WINDOW:
                    return True
                found = content.find(block, found + 1)
    return False


def _common_run(tokens: np.ndarray, place: int, ids: np.ndarray, start: int) -> int:
    """Length of the common run of tokens and ids around tokens[place] = ids[start]."""
    before = min(place, start)
    left = tokens[place - before : place][::-1] == ids[start - before : start][::-1]
    after = min(len(tokens) - place, len(ids) - start)
    right = tokens[place : place + after] == ids[start : start + after]
    return sum(len(equal) if equal.all() else int(equal.argmin()) for equal in (left, right))
