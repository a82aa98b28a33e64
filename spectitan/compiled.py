"""Operations between matrix products, compiled into a few loops over rows."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_wanted = False


def compile_loops(wanted: bool) -> None:
    """Whether `call` compiles from now on."""
    global _wanted
    _wanted = wanted


def is_wanted() -> bool:
    return _wanted


def call(operations: Callable, *inputs, rows: int):
    """operations(*inputs); compiled, if that is wanted, at its first call and for any size of the tensors' dimension `rows`."""
    if not _wanted:
        return operations(*inputs)
    for x in inputs:
        if isinstance(x, Tensor):
            torch._dynamo.maybe_mark_dynamic(x, rows)
    return _compiled(operations)(*inputs)


@functools.cache
def _compiled(operations: Callable) -> Callable:
    return torch.compile(operations)
