"""Keeps freed memory in the process: a training step asks for the same large tensors again and again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's names of what mallopt sets


def keep_freed_memory() -> bool:
    """Stop the C library from giving freed tensors back to the system; False where it cannot be told.

    Every page given back is zeroed when it is asked for again: a tenth of a step whose tensors hold 16 MB and more.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return False
    settings = {_MMAP_THRESHOLD: 1 << 25, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 1 << 26}
    return all(mallopt(name, value) for name, value in settings.items())
