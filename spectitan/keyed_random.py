"""Random numbers as a pure function of keys: nothing to save, and the same on every rank, layout and resume."""

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit integers; int64 arithmetic wraps as uint64 does.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_keys(seed: int, *keys: Tensor | int) -> Tensor:
    """int64 hash of the seed and the broadcast keys. The seed is hashed as a key: added to one, streams would overlap."""
    state = torch.zeros((), dtype=torch.int64)
    for key in (seed, *keys):
        key = torch.as_tensor(key, dtype=torch.int64)
        state = state.to(key.device) + key + _GAMMA if key.dim() else state + int(key) + _GAMMA
        state = (state ^ _shift_right(state, 30)) * _MIX_1
        state = (state ^ _shift_right(state, 27)) * _MIX_2
        state = state ^ _shift_right(state, 31)
    return state


def uniform(seed: int, *keys: Tensor | int) -> Tensor:
    """float64 in (0, 1) of the keys' broadcast shape; the same for the same seed and keys, wherever it is computed."""
    return (_shift_right(hash_keys(seed, *keys), 12).double() + 0.5) / 2**52
