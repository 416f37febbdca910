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
from hadal.kernels.cpu.layout import PAGE_TOKENS, Places
from hadal.kernels.cpu.target import CpuError, cache_folder

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
    """State of one sequence after `position` tokens; `draft` belongs to the draft blocks, which run in plain torch.

    Pages that are full never change again, so copies share them.
    """

    places: Places
    home: np.ndarray
    pages: list[np.ndarray] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros(8, np.int64))
    draft: list[Any] = field(default_factory=list)
    position: int = 0
    draft_position: int = 0

    def __post_init__(self) -> None:
        # Asked for once: numpy takes longer to tell an address than a row of a small model takes to compute.
        self.home_address, self.table_address = address(self.home), address(self.table)

    def extend(self, end: int) -> None:
        """Make room for the tokens before position `end`."""
        while len(self.pages) * PAGE_TOKENS < end:
            if len(self.pages) == len(self.table):
                self.table = np.concatenate((self.table, np.zeros_like(self.table)))
                self.table_address = address(self.table)
            self._add(buffer(self.places.page_bytes))

    def _add(self, page: np.ndarray) -> None:
        self.table[len(self.pages)] = address(page)
        self.pages.append(page)

    def clone(self) -> CpuState:
        """An independent copy: continuing one leaves the other as it is."""
        home = buffer(len(self.home))
        home[:] = self.home
        copy = CpuState(self.places, home, [], np.zeros_like(self.table))
        for i, page in enumerate(self.pages):
            if (i + 1) * PAGE_TOKENS > self.position:
                page, source = buffer(len(page)), page
                page[:] = source
            copy._add(page)
        copy.draft = [d.clone() for d in self.draft]
        copy.position, copy.draft_position = self.position, self.draft_position
        return copy

    def nbytes(self) -> int:
        """Bytes held for this sequence, shared pages included."""
        drafts = sum(p.nbytes if isinstance(p, Tensor) else p.nbytes() for d in self.draft for p in d.parts())
        return int(self.home.nbytes + sum(p.nbytes for p in self.pages) + self.table.nbytes + drafts)


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
