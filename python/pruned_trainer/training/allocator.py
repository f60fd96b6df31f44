"""Lets glibc's malloc keep the memory that a training step frees, for the next step.

A step on a CPU allocates the same large tensors again and again. By default glibc maps memory of its own for
each of them, and gives it back when the tensor is freed, so that the kernel has to find and clear every page
anew in every step.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Set to 0, it leaves the allocator as it is.
SWITCH = "PRUNED_TRAINER_KEEP_MEMORY"

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20  # by so much more than is needed the heap grows, and less often


def keep_freed_memory() -> str | None:
    """Let the process keep what it frees, from now on: no memory is mapped for a single tensor, and the heap
    never shrinks. So the process stays as large as it was at its largest.

    Returns None where that is done, or a sentence that says why it is not: another allocator is loaded
    (jemalloc, tcmalloc), the C library is not glibc, or the environment has PRUNED_TRAINER_KEEP_MEMORY=0.
    """
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    libc = _glibc()
    if libc is None:
        return "the C library is not glibc"
    # The first malloc that the process finds is the one that everybody in it calls.
    if _address(ctypes.CDLL(None), "malloc") != _address(libc, "malloc"):
        return "malloc is another allocator's than glibc's"
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _TOP_PAD_BYTES))
    if not all(libc.mallopt(parameter, value) for parameter, value in settings):
        return "glibc's mallopt refused"
    return None


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process; None if it is not glibc."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
