"""How often each token is a target: what a drafter's reduced vocabulary is chosen by."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spectitan.data.progress import Progress
from spectitan.data.shards import Shards
from spectitan.errors import UserError
from spectitan.files import write_whole

_BLOCK_TOKENS = 2**22  # in memory at once


def count_targets(corpus: Sequence[Shards], vocab_size: int) -> np.ndarray:
    """int64 [vocab_size], how often each id may be a target: by the masks, and never as the first of its document. Cuts at the
    ends of samples are not looked at."""
    counts, done = np.zeros(vocab_size, np.int64), 0
    with Progress("counting targets", sum(shards.num_tokens for shards in corpus), "M tokens") as progress:
        for shards in corpus:
            start = 0
            while start < shards.num_tokens:
                stop = min(start + _BLOCK_TOKENS, shards.file_end(start))
                counts += _count(shards, start, stop, vocab_size)
                done, start = done + stop - start, stop
                progress.update(done)
    return counts


def _count(shards: Shards, start: int, stop: int, vocab_size: int) -> np.ndarray:
    targets = np.ones(stop - start, bool)
    targets &= shards.read_mask(start, stop)
    first, last = np.searchsorted(shards.offsets, [start, stop])
    targets[shards.offsets[first:last] - start] = False
    return np.bincount(shards.read(start, stop)[targets], minlength=vocab_size)


def write_token_freq(path: Path, counts: np.ndarray) -> None:
    """A file of speculators' format, which torch.load(weights_only=True) reads: a dictionary, token id -> count, of the ids that occur.

    Raises:
        UserError: it cannot be written.
    """
    content = io.BytesIO()
    torch.save({token: int(counts[token]) for token in np.flatnonzero(counts).tolist()}, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise UserError(f"prepare.token_freq = {str(path)!r}: {error.strerror}") from None
