"""What this machine can do at most: memory read rate and matrix product rate, measured beside what is to be judged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 28
GEMM_SIDE = 1024
REPEATS = 3


def seconds_of(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall seconds of `repeats` runs after a warm one."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def read_rate() -> float:
    """Bytes per second at which memory beyond the caches is read (a sum over 256 MiB)."""
    block = torch.ones(READ_BYTES // 4)
    return READ_BYTES / seconds_of(lambda: block.sum())


def gemm_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square product of 1,024 in `dtype`."""
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE).to(dtype) for _ in range(2))
    return 2 * GEMM_SIDE**3 / seconds_of(lambda: a @ b)
