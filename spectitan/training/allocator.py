"""How a program's large CPU tensors get their memory."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 8 << 20


def use_huge_pages() -> None:
    """Has PyTorch ask for 2 MB pages for CPU tensors of 2 MB and more; to be called before the first tensor is made.

    glibc gives every large buffer back to the system when it is freed, and the next step faults all its pages in again, 4 kB
    at a time: with 33M trained parameters in float32 that was more than half of the time of the backward. 512 times larger
    pages leave little of it, and cost no memory, whereas raised MALLOC thresholds fragment the heap (64 MiB tensors between
    small ones that stay: 315 MB grew to 2.2 GB in 60 rounds).

    That is, of large tensors. One of 1 to 8 MB, as the activations of a small model are and the blocks of a compiled loss, has few
    whole pages of 2 MB in it. These are kept in the heap: a step of EAGLE-3 with 2,048 tokens of width 512 takes a fifth less, and
    0.2 GB more. Left alone, glibc would raise that threshold by itself, up to 32 MiB.

    Linux only, elsewhere without effect; values that the user has set win. For the whole process, so only programs call it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
            mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def trim_heap() -> None:
    """Gives freed memory that the heap keeps, in case it is asked for again, back to the system: after work that is done once, as
    building a model, tokenising and compiling, that is tens of megabytes. glibc only, elsewhere without effect."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)
