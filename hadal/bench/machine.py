"""What this machine can do at most: memory reads and matrix products, timed beside what is to be judged."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LARGEST_READ = 1 << 30
READ_SPAN = 1 << 27  # bytes of one timing; less than that would time the clock
GEMM_SIDE = 1024
GEMM_TIMES = 8
WARM_SECONDS = 0.2  # matrix units take a while to reach their pace


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def reader(nbytes: float) -> Callable[[], float]:
    """A timer of reads: seconds for `nbytes` bytes, which are read again and again as the weights of a model are.

    Above 1 GiB it reads that much and scales the time. It takes the faster of a sum and a product with itself.
    """
    held = min(int(nbytes), LARGEST_READ)
    block = torch.ones(max(held // 4, 1))
    times = max(1, READ_SPAN // held)
    kinds: list[Callable[[], object]] = [block.sum, lambda: torch.dot(block, block)]
    for kind in kinds:
        kind()
    taken = [seconds_of(kind) for kind in kinds]
    read = kinds[taken.index(min(taken))]
    return lambda: seconds_of(lambda: [read() for _ in range(times)]) / times * (nbytes / held)


def multiplier() -> Callable[[], float]:
    """A timer of products: floating-point operations per second of BF16 squares of 1,024."""
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE).bfloat16() for _ in range(2))

    def multiply() -> None:
        for _ in range(GEMM_TIMES):
            torch.mm(a, b)

    began = time.perf_counter()
    while time.perf_counter() - began < WARM_SECONDS:
        multiply()
    return lambda: 2 * GEMM_SIDE**3 * GEMM_TIMES / seconds_of(multiply)
