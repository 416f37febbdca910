"""Call: a few jobs of the table `cpu` put together for one operator and run at once, with buffers that calls share.

Addresses and strides are in bytes. One call runs at a time in a process.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hadal.kernels.cpu import listed, matmul, rounding, sites
from hadal.kernels.cpu.memory import Scratch, address
from hadal.kernels.cpu.program import WORD, KernelModule
from hadal.kernels.cpu.target import CpuError, Isa, Library, detect
from hadal.kernels.cpu.team import team

_CHUNK_ROWS = 512  # so many stay in the second cache
_lock = threading.Lock()
_spaces: dict[str, Scratch] = {}
_STEP = np.zeros(1, np.int64)  # these kernels read no word of a step


class Call:
    """Jobs in order; every one ends with a barrier."""

    def __init__(self, isa: Isa) -> None:
        self._isa = isa
        self._addresses, self._words = _compiled(isa)
        self._jobs: list[tuple[int, int]] = []  # kernel's address, index of its first word
        self._arguments: list[int] = []
        self._held: list[Any] = []

    def space(self, name: str, count: int, width: int) -> tuple[int, int]:
        """Address and stride of a buffer for `count` rows of `width` bytes; ask for each name once in a call."""
        stride = (-(-width // 256) * 4 + 1) * 64  # an odd number of lines, so that rows do not fall on the same sets
        nbytes = (count + matmul.ROW_PADDING) * stride
        return _space(name).reserve(nbytes), stride

    def hold(self, values: np.ndarray) -> int:
        """The address of a contiguous array, which lives as long as the call."""
        assert values.flags.c_contiguous
        self._held.append(values)
        return address(values)

    def job(self, kernel: str, **words: int) -> None:
        """Append a job; all of its kernel's words must be given."""
        names = self._words[kernel]
        assert len(words) == len(names), sorted(set(words) ^ set(names))
        self._jobs.append((self._addresses[kernel], len(self._arguments)))
        self._arguments += [words[name] for name in names]

    def take(self, x_TD: Tensor, *, quantised: bool, index: np.ndarray | None = None) -> tuple[int, int]:
        """Rows of x, those that `index` names or all, as a product reads them."""
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        self._held.append(x_TD)
        count = len(x_TD) if index is None else len(index)
        rows, stride = self.space("rows", count, 2 * x_TD.shape[1])
        self.job(
            "take_fp8" if quantised else "take", rows=x_TD.data_ptr(), row_stride=2 * x_TD.stride(0),
            index=0 if index is None else self.hold(index), out=rows, out_stride=stride, columns=x_TD.shape[1],
            count=count,
        )  # fmt: skip
        return rows, stride

    def product(
        self, form: matmul.Format, epilogue: matmul.Epilogue, groups: Sequence[Sequence[int]], rows: tuple[int, int],
        out: tuple[int, int], *, panels: int, blocks: int, weight: int = 0, weight_step: int = 1, row_step: int = 0,
        out_step: int = 0,
    ) -> None:  # fmt: skip
        """Append a product of rows by (matrix, first row, count) groups; a matrix is the address of its panels.

        With a `weight` it is the index of a matrix `weight_step` bytes long there.
        """
        table = np.array([len(groups), *(word for group in groups for word in group)], np.int64)
        expanded = blocks * matmul.EXPANDED
        threads = _space("threads").reserve(torch.get_num_threads() * expanded)
        self._held.append(_space("threads").content)  # a wider product of this call may replace it
        self.job(
            f"product_{form}_{epilogue}", weight=weight, weight_step=weight_step, rows=rows[0], row_stride=rows[1],
            row_step=row_step, out=out[0], out_stride=out[1], out_step=out_step, panels=panels, blocks=blocks,
            groups=self.hold(table), scratch=threads, scratch_step=expanded, mixing=0, limit=0,
        )  # fmt: skip

    def run(self) -> None:
        """Run all jobs."""
        words = self.hold(np.array(self._arguments, np.int64))
        table = np.array([(kernel, words + WORD * first, 1) for kernel, first in self._jobs], np.int64)
        team(self._isa).run(table, len(table), _STEP)


def _space(name: str) -> Scratch:
    if name not in _spaces:
        _spaces[name] = Scratch()
    return _spaces[name]


@contextmanager
def calling() -> Iterator[Call]:
    """A call whose jobs run when the block ends."""
    isa, reason = detect()
    if isa is None:
        raise CpuError(f"no CPU kernels here: {reason}")
    with _lock:
        call = Call(isa)
        yield call
        call.run()


def row_chunks(count: int) -> list[tuple[int, int]]:
    """(first, count) of the rows that a product takes at once."""
    return [(first, min(_CHUNK_ROWS, count - first)) for first in range(0, count, _CHUNK_ROWS)]


def real(value: float) -> int:
    """A float as a word."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


@cache
def _compiled(isa: Isa) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Addresses and words of all kernels of the table."""
    module = KernelModule(isa, ["none"])
    for quantised in (False, True):
        rounding.emit_take(module, quantised=quantised)
        rounding.emit_gate(module, quantised=quantised)
    rounding.emit_sum(module)
    forms: tuple[matmul.Format, ...] = ("bf16", "fp8", "fp4")
    for form in forms:
        matmul.emit_products(module, form, "bf16")
    matmul.emit_products(module, "bf16", "f32")
    sites.emit_sites(module)
    listed.emit_listed(module)
    library = Library(module.text(), isa)
    _libraries.append(library)
    return {name: library.address(name) for name in module.arguments}, module.arguments


_libraries: list[Library] = []  # compiled code stays loaded
