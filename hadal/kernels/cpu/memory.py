"""Memory of the CPU path: aligned buffers, sequence states, and packed weights kept on disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hadal.device import memory_available
from hadal.kernels.cpu.layout import Places
from hadal.kernels.cpu.target import CpuError, cache_folder
from hadal.kernels.pages import PAGE_TOKENS, REWIND, SLACK, Page, PagePool

_PADDING = 4096  # kernels may read a little past the end of a buffer
_KEEP_FROM = 1 << 25  # bytes; packing less takes a fraction of a second
_ABANDONED = 3600  # seconds after which an unfinished file belongs to nobody
PACK_VERSION = 3  # of the packed layout; a change makes old cache files unfit


def buffer(nbytes: int) -> np.ndarray:
    """Zeroed bytes that begin on a cache line."""
    raw = np.zeros(nbytes + _PADDING, np.uint8)
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
class CpuState:
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
    peak: int = 0  # the furthest position it has rewound from

    def __post_init__(self) -> None:
        # Asked for once: numpy takes longer to tell an address than a row of a small model takes to compute.
        self.home_address, self.table_address = address(self.home), address(self.table)

    def extend(self, end: int) -> None:
        """Make room for the tokens before position `end`."""
        while len(self.pages) * PAGE_TOKENS < end:
            if len(self.pages) == len(self.table):
                self._use_table(np.concatenate((self.table, np.zeros_like(self.table))))
            self._put(self.pool.take())

    def clone(self) -> CpuState:
        """An independent copy: continuing one leaves the other as it is."""
        home = buffer(len(self.home))
        home[:] = self.home
        drafts = [d.clone() for d in self.draft]
        twin = CpuState(self.places, self.pool, home, list(self.pages), self.table.copy(), drafts, self.position)
        twin.draft_position, twin.peak = self.draft_position, self.peak
        twin._part()
        return twin

    @property
    def rewindable(self) -> int:
        """Tokens that it can forget."""
        return min(REWIND, self.position - max(self.peak - SLACK, 0))

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens`, at most `rewindable`."""
        assert 0 <= tokens <= self.rewindable
        was_full = self.position // PAGE_TOKENS
        self.peak = max(self.peak, self.position)
        self.position -= tokens
        if self.position // PAGE_TOKENS < was_full:
            self._part()  # a page that was full may have other readers
        else:
            del self.pages[-(-self.position // PAGE_TOKENS) :]

    def adopt(self, pages: Sequence[Page]) -> None:
        """Continue behind pages that hold the tokens before the position."""
        assert not self.pages and len(pages) == -(-self.position // PAGE_TOKENS)
        while len(self.table) < len(pages):
            self._use_table(np.zeros(2 * len(self.table), np.int64))
        for page in pages:
            self._put(page)

    def dump(self) -> bytes:
        """All but the pages and torch drafts, for `CpuRunner.restore_state`."""
        return np.array([self.position, self.peak]).tobytes() + self.home.tobytes()

    def nbytes(self) -> int:
        """Bytes held for this sequence, shared pages included."""
        drafts = sum(d.nbytes() for d in self.draft)
        return int(self.home.nbytes + len(self.pages) * self.pool.page_bytes + self.table.nbytes + drafts)

    def _part(self) -> None:
        """Own the page that is not full; others may refer to it."""
        del self.pages[-(-self.position // PAGE_TOKENS) :]
        if self.position % PAGE_TOKENS:
            self._put(self.pool.copy(self.pages.pop()))

    def _put(self, page: Page) -> None:
        self.table[len(self.pages)] = page.address
        self.pages.append(page)

    def _use_table(self, table: np.ndarray) -> None:
        self.table, self.table_address = table, address(table)


@dataclass(frozen=True)
class Packing:
    """One weight to be packed: its name, its bytes, and what writes them."""

    name: str
    nbytes: int
    write: Callable[[Tensor], object]


def packed_weights(items: Sequence[Packing], identity: str | None) -> tuple[dict[str, int], Any]:
    """Addresses of all packed weights and what keeps them alive.

    With an `identity` (of the checkpoint's files) they are written once to a file in the cache folder, under that
    identity and the layout, and mapped from there. Small models, and those whose file cannot be written, are packed in
    memory.
    """
    offsets, total = {}, 0
    for item in items:
        offsets[item.name] = total
        total += -(-item.nbytes // 64) * 64
    described = "".join(f"{i.name}:{i.nbytes};" for i in items)
    held: Any = None
    if identity is not None and total >= _KEEP_FROM:
        key = hashlib.sha256(f"{PACK_VERSION};{identity};{described}".encode()).hexdigest()[:32]
        held = _mapped(cache_folder() / "weights" / f"{key}.bin", items, offsets, total)
    if held is None:
        if total > memory_available(torch.device("cpu")):
            raise CpuError(
                f"neither {cache_folder()} nor memory has room for {total / 2**30:.1f} GiB of packed weights; "
                "set HADAL_CACHE to a folder with room"
            )
        held = buffer(total)
        _fill(held, items, offsets)
    base = address(held)
    return {name: base + offset for name, offset in offsets.items()}, held


def _mapped(path: Path, items: Sequence[Packing], offsets: dict[str, int], total: int) -> np.ndarray | None:
    size = total + _PADDING
    try:
        if not path.exists() or path.stat().st_size != size:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob("*.bin.*"):  # by a process that was killed while it packed
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
            partial = path.with_name(f"{path.name}.{np.random.default_rng().integers(1 << 62):x}")
            try:
                with partial.open("wb") as file:
                    _reserve(file.fileno(), size)
                fresh = np.memmap(partial, np.uint8, "r+", shape=(size,))
                _fill(fresh, items, offsets)
                fresh.flush()
                del fresh
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return np.memmap(path, np.uint8, "r", shape=(size,))
    except OSError:
        return None  # no room or no right to write: the weights are packed in memory


def _reserve(file: int, size: int) -> None:
    """Take the disk's room at once: a page of a mapped file for which there is none ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _fill(target: np.ndarray, items: Sequence[Packing], offsets: dict[str, int]) -> None:
    for item in items:
        begin = offsets[item.name]
        item.write(torch.from_numpy(target[begin : begin + item.nbytes]))
