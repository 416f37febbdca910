"""JobList: jobs with their words, the spaces they work in, and the table that a team runs."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hadal.config import CSA_RATIO, ModelConfig
from hadal.kernels.cpu import attention, matmul
from hadal.kernels.cpu.layout import Shapes
from hadal.kernels.cpu.memory import Scratch, address, buffer
from hadal.kernels.cpu.target import Isa, Library

LINE = 64


def row_stride(nbytes: int) -> int:
    """Bytes from row to row: an odd number of cache lines, so that rows do not fall on the same sets."""
    lines = -(-nbytes // LINE)
    return (lines + 1 - lines % 2) * LINE


class Place(NamedTuple):
    """Rows that lie elsewhere: an address, or the dynamic word that will hold it, and a stride."""

    address: int | str
    stride: int


class Part(NamedTuple):
    """Jobs `begin` to `end` make logits of the wanted rows; `streams` is the job after which the streams stand."""

    begin: int
    streams: int
    end: int


class ExpertJobs(NamedTuple):
    """Before job `grouped` the rows of a layer are grouped by expert, jobs `begin` to `end` multiply the groups."""

    grouped: int
    begin: int
    end: int


class Space:
    """Rows of a step's intermediate values."""

    def __init__(self, width: int, count: int) -> None:
        self.stride = row_stride(width)
        self._bytes = buffer(self.stride * count)
        self.address = address(self._bytes)

    def rows(self, count: int, width: int) -> Tensor:
        """The first rows as FP32 [count, width]."""
        whole = self._bytes.view(np.float32).reshape(-1, self.stride // 4)
        return torch.from_numpy(whole[:count, :width])


class JobList:
    """Jobs being collected, then the table that a team runs.

    Words that change from step to step are named in `_dynamic` and set by `set`; group tables hold (matrix, first row,
    rows) and are filled by the runner.
    """

    def __init__(self, isa: Isa, config: ModelConfig, shapes: Shapes, max_rows: int) -> None:
        self.isa, self.config, self.shapes, self.max_rows = isa, config, shapes, max_rows
        self.space: dict[str, Space] = {}
        self.plain_group = np.array([1, 0, 0, 0], np.int64)
        self.stream_group = np.array([1, 0, 0, 0], np.int64)
        self.head_group = np.array([1, 0, 0, 0], np.int64)
        groups = [word for g in range(config.o_groups) for word in (g, 0, 0)]
        self.output_groups = np.array([config.o_groups, *groups], np.int64)
        self.expert_groups = np.zeros(1 + 3 * shapes.experts, np.int64)
        self.experts: list[ExpertJobs] = []
        self.sites: dict[tuple[int, str], tuple[int, int]] = {}  # jobs from a site's input to its output
        self.main = self.draft = Part(0, 0, 0)
        self.logits_width = 0
        self._expander_bytes = 0
        self._held: list[Any] = []
        self._jobs: list[tuple[str, np.ndarray, bool]] = []
        self._values: dict[str, int] = {}
        # Of each kind of compressed layer: the ratio, and the most entries that a row attends to.
        self._ratios = {
            (x.ratio, shapes.topk if x.attention == "csa" else config.max_position_embeddings)
            for x in config.layers
            if x.ratio
        }
        self._dynamic: dict[str, list[tuple[np.ndarray, int]]] = {}
        self.words: dict[str, list[str]] = {}  # of each kernel

    @property
    def count(self) -> int:
        """Number of jobs."""
        return len(self._jobs)

    def rows(self, name: str, width: int, count: int | None = None) -> Space:
        """The space of that name, made when first asked for; it has room behind the last row."""
        if name not in self.space:
            self.space[name] = Space(width, (count or self.max_rows) + matmul.ROW_PADDING)
        assert self.space[name].stride >= width, name
        return self.space[name]

    def hold(self, values: Tensor) -> int:
        """The address of a constant, copied so that kernels may read past its end."""
        data = values.detach().contiguous().view(-1).view(torch.uint8).numpy()
        copy = buffer(len(data))
        copy[:] = data
        self._held.append(copy)
        return address(copy)

    def add(self, kernel: str, *, barrier: bool = True, **words: int | float | str) -> None:
        """Append a job; a word that is a text is dynamic and set later under that name."""
        names = self.words[kernel]
        assert sorted(words) == sorted(names), (kernel, sorted(words), sorted(names))
        array = np.zeros(max(len(names), 1), np.int64)
        for i, name in enumerate(names):
            value = words[name]
            if isinstance(value, str):
                self._dynamic.setdefault(value, []).append((array, i))
            else:
                array[i] = struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else value
        self._jobs.append((kernel, array, barrier))

    def set(self, name: str, value: int) -> None:
        """Give a dynamic word its value in every job that has it."""
        if self._values.get(name) != value:
            self._values[name] = value
            for array, i in self._dynamic.get(name, ()):
                array[i] = value

    def finish(self, library: Library) -> None:
        """Look up the kernels' addresses."""
        self._held.append(library)
        self.table = np.array(
            [[library.address(name), address(array), barrier] for name, array, barrier in self._jobs], np.int64
        )

    def note_product(self, blocks: int) -> None:
        """Remember the widest product, whose expanded panel must fit into a thread's scratch."""
        self._expander_bytes = max(self._expander_bytes, blocks * matmul.EXPANDED)

    def thread_bytes(self, end: int) -> int:
        """Scratch that one thread needs when the longest sequence ends at position `end`."""
        return max(self._expander_bytes, attention.scratch_bytes(self.shapes, self._most_entries(end)))

    def entry_bytes(self, end: int) -> int:
        """Bytes into which one sequence's visible entries are unpacked."""
        return attention.entries_bytes(self.shapes, self._most_entries(end))

    def _most_entries(self, end: int) -> int:
        return max((min(end // ratio, most) for ratio, most in self._ratios), default=0)

    def set_scores(self, scratch: Scratch, rows: int, end: int) -> None:
        """Make room for index scores of `rows` rows."""
        if (CSA_RATIO, self.shapes.topk) in self._ratios:
            stride = (end // CSA_RATIO + 64) // 64 * 256
            self.set("scores", scratch.reserve(rows * stride))
            self.set("scores_stride", stride)
