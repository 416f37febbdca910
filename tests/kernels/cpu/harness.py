"""What tests of emitted kernels share: compiling a module, aligned buffers, and running one job by hand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu.layout import PAGE_TOKENS, SPAN, STEP, Shapes
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.target import Isa, Library, detect

pytest.importorskip("llvmlite")


def shapes(**sizes: int) -> Shapes:
    """Shapes of which a test names what it needs."""
    some = dict(
        hidden=64, streams=4, heads=4, dim=96, rotary=32, window=64, index_heads=2, index_dim=64, topk=32, experts=4,
        active=2, vocabulary=16, sinkhorn=2,
    )  # fmt: skip
    return Shapes(**(some | sizes), norm_eps=1e-6, hc_eps=1e-6)


NANO = shapes()
SMALL = shapes(heads=8, dim=512, rotary=64, window=128, index_heads=8, index_dim=128, topk=512)
FLASH = shapes(heads=64, dim=512, rotary=64, window=128, index_heads=64, index_dim=128, topk=512)


def instruction_sets() -> list[str]:
    """Those this processor runs, best first."""
    best, _ = detect()
    order = ["amx", "avx512", "avx2"]
    if best is None or best.name not in order:
        return [] if best is None else [best.name]
    return order[order.index(best.name) :]


def buffer(nbytes: int, fill: int = 0) -> np.ndarray:
    """Bytes that begin on a cache line, with room behind them for whole vectors."""
    raw = np.full(nbytes + 192, fill, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes]


def address(array: np.ndarray | Tensor) -> int:
    """Where the data lies."""
    return array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data


def walsh(dim: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix in float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix * dim**-0.5


def random(seed: int, *shape: int) -> Tensor:
    """Normal numbers that a seed repeats."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Kernels:
    """A compiled module; a job's threads run one after the other, as no kernel needs another thread's result."""

    def __init__(self, isa: str, emit: Callable[[KernelModule], None]) -> None:
        self.isa = Isa(isa)
        module = KernelModule(self.isa, STEP)
        emit(module)
        self._words = module.arguments
        self._library = Library(module.text(), self.isa)

    def run(self, name: str, step: np.ndarray, threads: int = 1, **words: int) -> None:
        """Run one kernel; `words` are all of its arguments."""
        assert set(words) == set(self._words[name]), set(words) ^ set(self._words[name])
        arguments = np.array([words[word] for word in self._words[name]], np.int64)
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(self._library.address(name))
        for thread in range(threads):
            function(address(arguments), address(step), thread, threads)


class Sequence:
    """A home and pages."""

    def __init__(self, home_bytes: int, page_bytes: int, tokens: int, fill: int = 0) -> None:
        self.home = buffer(home_bytes, fill)
        self.pages = [buffer(page_bytes, fill) for _ in range(-(-tokens // PAGE_TOKENS))]
        self.table = np.array([address(page) for page in self.pages] + [0] * 8, np.int64)
        self.position = 0


class Step:
    """The words of a step in which each sequence takes `lengths` new tokens; those with none take no part."""

    def __init__(self, sequences: list[Sequence], lengths: list[int], angles: Tensor | None = None) -> None:
        taking = [(s, n) for s, n in zip(sequences, lengths, strict=True) if n]
        self.spans = np.zeros((len(taking) + 1, len(SPAN)), np.int64)
        positions: list[int] = []
        span_of: list[int] = []
        for i, (sequence, length) in enumerate(taking):
            words = dict(start=sequence.position, length=length, row=len(positions))
            words |= dict(home=address(sequence.home), pages=address(sequence.table))
            for name, word in words.items():
                self.spans[i, SPAN.index(name)] = word
            positions += range(sequence.position, sequence.position + length)
            span_of += [i] * length
            sequence.position += length
        self.positions, self.span_of = np.array(positions, np.int64), np.array(span_of, np.int64)
        self.angles = angles
        self.words = np.zeros(len(STEP), np.int64)
        values = dict(rows=len(positions), spans=len(taking), positions=address(self.positions))
        values |= dict(span_of=address(self.span_of), span_table=address(self.spans))
        if angles is not None:
            values["angles"] = address(angles)
        for name, word in values.items():
            self.words[STEP.index(name)] = word
