"""What a store of hidden states is: a cache that is filled here, or other systems' files."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from spectitan.data.packing import PackedDataset
from spectitan.states.precision import Stored

FILL_IT = "allowed: fill it (spectitan.prepare --prepare.states true, or states.source = hybrid), or states.on_missing = skip or warn"


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
