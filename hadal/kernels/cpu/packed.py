"""Packed weights: written once to a file of the cache folder and mapped from there, in memory where that cannot be.

A file begins with a page that names the weights and their layout; it is written after everything else has reached the
disk, and the file gets its name after that, so that a file with the right page is whole. A tensor at a time is held
while a file is written. Files are removed, the least recently used first, when the folder would hold more than
`HADAL_CACHE_LIMIT` GiB (half of the disk by default) or the disk has no room for a new one; whoever has such a file
mapped keeps it until it ends.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hadal.device import memory_available
from hadal.kernels.cpu.memory import PADDING, address, buffer
from hadal.kernels.cpu.target import CpuError, cache_folder

PAGE = 4096
KEEP_FROM = 1 << 25  # bytes; packing less takes a fraction of a second
_PIECE = 1 << 27  # bytes after which written and read pages are given back to the system
_ABANDONED = 3600  # seconds after which an unfinished file belongs to nobody
PACK_VERSION = 4  # of the packed layout; a change makes old cache files unfit


@dataclass(frozen=True)
class Packing:
    """A weight to be packed, or a stack of them: its name, the bytes of one, and what writes one, given its number.

    The members of a stack begin at multiples of `PAGE`, which divides their size, so that each can be read alone.
    """

    name: str
    nbytes: int
    write: Callable[[Tensor, int], object]
    count: int = 1


@dataclass(frozen=True)
class Packed:
    """Where each weight lies, by name; what keeps it alive: the mapping of all of `file`, or a buffer."""

    addresses: dict[str, int]
    held: np.ndarray
    file: Path | None

    def offset(self, name: str) -> int:
        """Where a weight begins in the file."""
        return self.addresses[name] - address(self.held)


def packed_weights(
    items: Sequence[Packing],
    identity: str | None,
    *,
    on_disk: bool = False,
    release: Callable[[], None] | None = None,
) -> Packed:
    """Pack the weights, or find them packed.

    With an `identity` (of the checkpoint's files) they are kept in a file under that identity and the layout. Small
    models, and those whose file cannot be written, are packed in memory, unless they are to be `on_disk`. `release` is
    called now and then while packing, to give back the memory of what was read. Raises CpuError where there is no room.
    """
    offsets, end = {}, PAGE
    for item in items:
        step = PAGE if item.count > 1 else 64
        assert item.count == 1 or item.nbytes % PAGE == 0
        offsets[item.name] = end = -(-end // step) * step
        end += item.nbytes * item.count
    size = -(-end // PAGE) * PAGE + PADDING
    file, held = None, None
    if identity is not None and (on_disk or size >= KEEP_FROM):
        described = "".join(f"{i.name}:{i.nbytes}:{i.count};" for i in items)
        key = hashlib.sha256(f"{PACK_VERSION};{identity};{described}".encode()).hexdigest()
        file = cache_folder() / "weights" / f"{key[:32]}.bin"
        header = f"hadal packed weights, version {PACK_VERSION}, {key}, {size} bytes\n".encode().ljust(PAGE, b"\0")
        held = _mapped(file, header, size, _parts(items, offsets), release)
    if held is None:
        file = None
        if on_disk or size > memory_available(torch.device("cpu")):
            raise CpuError(
                f"{cache_folder()} has no room for {size / 2**30:.1f} GiB of packed weights{'' if on_disk else ', nor'}"
                f"{'' if on_disk else ' has memory'}; set HADAL_CACHE to a folder with room"
            )
        held = buffer(size)
        for offset, item, i in _parts(items, offsets):
            item.write(torch.from_numpy(held[offset : offset + item.nbytes]), i)
    return Packed({name: address(held) + offset for name, offset in offsets.items()}, held, file)


_Part = tuple[int, Packing, int]


def _parts(items: Sequence[Packing], offsets: dict[str, int]) -> list[_Part]:
    """Every single weight: where it goes, what it belongs to, and its number there."""
    return [(offsets[item.name] + i * item.nbytes, item, i) for item in items for i in range(item.count)]


def _mapped(
    path: Path, header: bytes, size: int, parts: Sequence[_Part], release: Callable[[], None] | None
) -> np.ndarray | None:
    try:
        if not _whole(path, header, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob("*.bin.*"):  # by a process that was killed while it packed
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
            _make_room(path.parent, size)
            partial = path.with_name(f"{path.name}.{np.random.default_rng().integers(1 << 62):x}")
            try:
                _write(partial, header, size, parts, release)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        with suppress(OSError):
            os.utime(path)
        return np.memmap(path, np.uint8, "r", shape=(size,))
    except OSError:
        return None  # no room or no right to write


def _whole(path: Path, header: bytes, size: int) -> bool:
    if not path.exists() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(PAGE) == header


def _write(path: Path, header: bytes, size: int, parts: Sequence[_Part], release: Callable[[], None] | None) -> None:
    room = np.zeros(max(item.nbytes for _, item, _ in parts), np.uint8)
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # refuses at once where the disk is too small
        else:
            file.truncate(size)
        left = _PIECE
        for offset, item, i in parts:
            out = room[: item.nbytes]
            out[:] = 0
            item.write(torch.from_numpy(out), i)
            file.seek(offset)
            file.write(out.data)
            left -= item.nbytes
            if left < 0 or offset == parts[-1][0]:
                left = _PIECE
                file.flush()
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if release is not None:
                    release()
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def _make_room(folder: Path, size: int) -> None:
    """Remove the least recently used files until a new one of `size` bytes has room."""
    limit = _limit(folder)
    files = sorted((f.stat().st_mtime_ns, f, f.stat().st_size) for f in folder.glob("*.bin"))
    total = sum(nbytes for *_, nbytes in files)
    for _, file, nbytes in files:
        if total + size <= limit and shutil.disk_usage(folder).free >= size:
            return
        file.unlink(missing_ok=True)
        total -= nbytes


def _limit(folder: Path) -> float:
    """Bytes of packed weights to keep."""
    text = os.environ.get("HADAL_CACHE_LIMIT", "")
    if not text:
        return shutil.disk_usage(folder).total / 2
    try:
        limit = float(text) * 2**30
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise CpuError(f"HADAL_CACHE_LIMIT is {text!r}; give the GiB of packed weights to keep, or leave it unset")
    return limit
