"""Memory of the CPU path: aligned buffers and sequence states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from hadal.kernels.cpu.layout import Places
from hadal.kernels.pages import PAGE_TOKENS, Page, PagedState, PagePool

PADDING = 4096  # kernels may read a little past the end of a buffer


def buffer(nbytes: int) -> np.ndarray:
    """Zeroed bytes that begin on a cache line."""
    raw = np.zeros(nbytes + PADDING, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes]


def address(array: np.ndarray | Tensor) -> int:
    """Where an array's data lies."""
    return array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data


class Scratch:
    """A buffer that grows when more is asked of it; its content does not survive that."""

    def __init__(self) -> None:
        self.content = buffer(64)
        self.address = address(self.content)

    def reserve(self, nbytes: int) -> int:
        """The address of at least `nbytes` bytes."""
        if nbytes > len(self.content):
            self.content = buffer(nbytes + nbytes // 4)
            self.address = address(self.content)
        return self.address


@dataclass
class CpuState(PagedState):
    """State of one sequence after `position` tokens; `draft` belongs to draft blocks that run in plain torch.

    Pages that are full never change again, so copies share them. Rings and tails hold what a sequence needs after it
    has forgotten tokens.
    """

    places: Places
    pool: PagePool
    home: np.ndarray
    pages: list[Page] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros(8, np.int64))
    draft: list[Any] = field(default_factory=list)
    position: int = 0
    draft_position: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        # Asked for once: numpy takes longer to tell an address than a row of a small model takes to compute.
        self.home_address, self.table_address = address(self.home), address(self.table)

    def clone(self) -> CpuState:
        """An independent copy: continuing one leaves the other as it is."""
        home = buffer(len(self.home))
        home[:] = self.home
        drafts = [d.clone() for d in self.draft]
        twin = CpuState(self.places, self.pool, home, list(self.pages), self.table.copy(), drafts, self.position)
        twin.draft_position, twin.peak = self.draft_position, self.peak
        twin._part()
        return twin

    def adopt(self, pages: Sequence[Page]) -> None:
        """Continue behind pages that hold the tokens before the position."""
        assert not self.pages and len(pages) == -(-self.position // PAGE_TOKENS)
        for page in pages:
            self._put(page)

    def dump(self) -> bytes:
        """All but the pages and torch drafts, for `CpuRunner.restore_state`."""
        return np.array([self.position, self.peak]).tobytes() + self.home.tobytes()

    def nbytes(self) -> int:
        """Bytes held for this sequence, shared pages included."""
        drafts = sum(d.nbytes() for d in self.draft)
        return int(self.home.nbytes + len(self.pages) * self.pool.page_bytes + self.table.nbytes + drafts)

    def _put(self, page: Page) -> None:
        if len(self.pages) == len(self.table):
            self.table = np.concatenate((self.table, np.zeros_like(self.table)))
            self.table_address = address(self.table)
        self.table[len(self.pages)] = page.address
        self.pages.append(page)
