"""Memory of the fused loss that stays from step to step on a CPU: glibc would give blocks of that size back to the system when they are
freed, which then has to find and clear their pages again in each step. A GPU has PyTorch's caching allocator."""

import torch
from torch import Tensor

_kept: dict[tuple[str, torch.dtype], Tensor] = {}


def kept_memory(name: str, rows: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, len(like)] with any numbers in it, on the device of `like`. On a CPU the next call with the name gets the same memory."""
    dtype, size = dtype or like.dtype, rows * len(like)
    if like.device.type != "cpu":
        return like.new_empty(rows, len(like), dtype=dtype)
    if (name, dtype) not in _kept or _kept[name, dtype].numel() < size:
        _kept[name, dtype] = torch.empty(size, dtype=dtype)
    return _kept[name, dtype][:size].view(rows, len(like))
