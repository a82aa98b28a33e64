"""Hidden states as they are stored: in a floating-point dtype, or as int8 with a scale for each token and layer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_LARGEST = 127


class Stored(NamedTuple):
    """Columns are layers, and the final state."""

    numbers: Tensor  # [columns, ..., hidden]
    scales: Tensor | None  # float32 [columns, ...]; of int8 only: a state is numbers * scale


def encode(columns: Sequence[Tensor], dtype: torch.dtype) -> Stored:
    """States [..., hidden] of each column, in another precision.

    int8: the largest number of each token becomes 127 or -127, others are rounded. A state that is not finite, or does not fit into
    float16, gives a number or a scale that is not finite.
    """
    states = torch.stack(list(columns))
    if dtype != torch.int8:
        return Stored(states.to(dtype), None)
    states = states.float()
    scales = states.abs().amax(-1) / _LARGEST
    return Stored((states / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8), scales)


def decode(stored: Stored, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The states of each column, in the dtype that is computed in."""
    if stored.scales is None:
        return stored.numbers.to(dtype).unbind()
    return tuple((numbers.float() * scales[..., None]).to(dtype) for numbers, scales in zip(stored.numbers, stored.scales))


def bytes_per_token(columns: int, hidden_size: int, dtype: torch.dtype) -> int:
    return columns * (hidden_size * dtype.itemsize + (4 if dtype == torch.int8 else 0))


def to_bytes(stored: Stored) -> list[np.ndarray]:
    """uint8 arrays that hold the states, one after the other: scales, then numbers."""
    parts = [stored.numbers] if stored.scales is None else [stored.scales, stored.numbers]
    return [part.contiguous().flatten().view(torch.uint8).numpy() for part in parts]


def copy_bytes(raw: np.ndarray, columns: int, taken: Sequence[int], row: int, into: Stored) -> None:
    """Copies what `to_bytes` gave into the first tokens of a batch's row.

    Args:
        raw: the arrays of one sample, one after the other.
        columns: of the sample.
        taken: those of them that are wanted.
        into: numbers [len(taken), batch, seq, hidden], on the CPU.
    """
    hidden_size, dtype = into.numbers.shape[-1], into.numbers.dtype
    tokens = len(raw) // bytes_per_token(columns, hidden_size, dtype)
    if into.scales is not None:
        scales, raw = np.split(raw, [4 * columns * tokens])
        scales, target = scales.view(np.float32).reshape(columns, tokens), into.scales.numpy()
        for place, column in enumerate(taken):
            target[place, row, :tokens] = scales[column]
    numbers, target = raw.reshape(columns, tokens, -1), into.numbers.view(torch.uint8).numpy()
    for place, column in enumerate(taken):
        target[place, row, :tokens] = numbers[column]


def first_bad(stored: Stored) -> tuple[int, int] | None:
    """(column, token) of the first state [columns, tokens, hidden] that is not finite."""
    if stored.scales is not None:
        bad = ~stored.scales.isfinite()
    else:
        low, high = stored.numbers.aminmax() if stored.numbers.numel() else (torch.zeros(()), torch.zeros(()))  # many times faster
        if low.isfinite() and high.isfinite():
            return None
        bad = ~stored.numbers.isfinite().all(-1)
    return tuple(bad.nonzero()[0].tolist()) if bad.any() else None
