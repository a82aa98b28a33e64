"""What a store of hidden states is: a cache that is filled here, or other systems' files."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from spectitan.data.packing import PackedDataset
from spectitan.states.precision import Stored


class Store(Protocol):
    """Hidden states of samples."""

    folder: Path
    columns: tuple[int, ...]  # layer ids of a token's states, ascending, and FINAL
    hidden_size: int
    dtype: torch.dtype  # of the numbers, int8 with scales
    remedy: str  # for samples that are missing

    def refresh(self) -> None:
        """Learns of what has been added."""

    def find(self, dataset: PackedDataset, sample: int) -> object | None:
        """Where a sample's states are; None: nowhere."""

    def read(self, place: object, tokens: np.ndarray, documents: np.ndarray, taken: list[int], row: int, into: Stored) -> None:
        """See StatesCache.read."""


def allowed_if_missing(store: Store) -> str:
    """What a user may do when samples are missing under states.on_missing = raise."""
    return f"allowed: {store.remedy}, or states.on_missing = skip or warn"
