"""Slots: memory for some of a file's equal blocks, threads that read blocks into it, and the choice of what leaves.

A key is a block's number. Whoever needs blocks wants them, takes them as they arrive and releases them after use; until
then they stay. Blocks that are expected are read when nothing is wanted, and slots that are still empty are filled when
nothing is expected either.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hadal.kernels.cpu.memory import PADDING
from hadal.kernels.cpu.target import CpuError

READERS = 2  # a large read keeps a disk busy by itself, and more of them delay the one that is waited for
_TOUCHED = 1 << 28  # bytes, some tenths of a second of reading
_SAMPLE = 1 << 26  # bytes that tell the memory's rate
_KEPT = 0.98  # of a score per row: half of it is about the last 35 rows


class Slots:
    """`count` slots of `nbytes` bytes for the blocks of `file` that begin at `offsets`, all in whole pages."""

    def __init__(self, file: Path, offsets: Sequence[int], nbytes: int, count: int) -> None:
        self.nbytes, self.count = nbytes, count
        self.asked = self.hits = self.bytes_read = 0
        try:  # private and anonymous, which counts towards the process's limits
            self._memory = mmap.mmap(-1, count * nbytes + PADDING, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            size = f"{count * nbytes / 2**30:.1f} GiB"
            raise CpuError(f"{size} of memory for experts cannot be had ({error}); ask for less") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        room = np.frombuffer(self._memory, np.uint8, count * nbytes)
        room[:_TOUCHED] = 0  # so that the rate of the first reads is the disk's, not that of getting memory
        self.address: int = room.ctypes.data
        self._file, self._offsets = _open(file), offsets
        weakref.finalize(self, os.close, self._file)
        self._slot = np.full(len(offsets), -1)  # of each key; it is being read where it is not ready
        self._ready, self._pinned, self._soon = (np.zeros(len(offsets), bool) for _ in range(3))
        self._score = np.zeros(len(offsets))  # aged share of rows that asked for a key
        self._owner = np.full(count, -1)  # key of each slot
        self._wanted: deque[int] = deque()
        self._expected: deque[int] = deque()
        self._filling: deque[int] = deque()
        self._changed = threading.Condition()
        self._error: OSError | None = None
        self._closed = False
        for _ in range(READERS):
            threading.Thread(target=self._serve, daemon=True, name="hadal-reader").start()

    def close(self) -> None:
        """Let the readers go; nothing can be asked for afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fill(self, keys: Sequence[int], seconds: float) -> float:
        """Read `keys` into empty slots in idle time; waits some seconds and returns the bytes per second of these."""
        with self._changed:
            began, before = time.perf_counter(), self.bytes_read
            self._filling.extend(keys)
            self._changed.notify_all()
            end = before + len(keys) * self.nbytes
            while self.bytes_read < end and (left := began + seconds - time.perf_counter()) > 0:
                self._await(left)
            return (self.bytes_read - before) / (time.perf_counter() - began)

    def want(self, keys: np.ndarray) -> None:
        """Have `keys` read, and keep them until they are released."""
        with self._changed:
            self.asked += len(keys)
            self.hits += int(self._ready[keys].sum())
            self._pinned[keys] = True
            self._wanted.extend(keys[self._slot[keys] < 0].tolist())
            self._changed.notify_all()

    def expect(self, keys: Sequence[int]) -> None:
        """Replace what is expected by `keys`, the likeliest first."""
        with self._changed:
            self._soon[:] = False
            self._soon[list(keys)] = True
            self._expected = deque(keys)
            self._changed.notify_all()

    def arrived(self, keys: np.ndarray) -> np.ndarray:
        """The slot of each of the wanted `keys`, -1 for those still absent; waits until there is one."""
        with self._changed:
            while not (there := self._ready[keys]).any():
                self._await(None)
            return np.where(there, self._slot[keys], -1)

    def age(self, group: slice, keys: np.ndarray, shares: np.ndarray, rows: int) -> None:
        """Note which `shares` of `rows` rows have used which keys of a group."""
        kept = _KEPT**rows
        with self._changed:
            self._score[group] *= kept
            self._score[keys] += (1 - kept) * shares

    def release(self, keys: np.ndarray) -> None:
        """Let wanted keys leave again."""
        with self._changed:
            self._pinned[keys] = False
            self._changed.notify_all()

    def memory_rate(self) -> float:
        """Bytes per second at which the first slots can be summed, at best."""
        words = torch.frombuffer(self._memory, dtype=torch.int64, count=min(self.count * self.nbytes, _SAMPLE) // 8)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            words.sum()
            seconds.append(time.perf_counter() - began)
        return words.nbytes / min(seconds)

    def resident(self) -> list[int]:
        """The keys that are in memory."""
        with self._changed:
            return np.flatnonzero(self._ready).tolist()

    def _await(self, seconds: float | None) -> None:
        if self._error is not None:
            raise CpuError(f"the packed weights cannot be read ({self._error}); check the disk and load again")
        self._changed.wait(seconds)

    def _serve(self) -> None:
        try:
            while (task := self._take()) is not None:
                key, slot = task
                self._read(self._offsets[key], memoryview(self._memory)[slot * self.nbytes : (slot + 1) * self.nbytes])
                with self._changed:
                    self._ready[key] = True
                    self.bytes_read += self.nbytes
                    self._changed.notify_all()
        except OSError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file, [target[done:]], offset + done)
            if not count:
                raise OSError("the file ends too early")
            done += count

    def _take(self) -> tuple[int, int] | None:
        """Wait for a key to be read; its slot loses what it held."""
        with self._changed:
            while (task := self._next()) is None:
                if self._closed:
                    return None
                self._changed.wait()
            key, slot = task
            if (before := self._owner[slot]) >= 0:
                self._slot[before], self._ready[before] = -1, False
            self._owner[slot], self._slot[key] = key, slot
            return task

    def _next(self) -> tuple[int, int] | None:
        # An empty slot is worth -1 and one in use its key's score; what is expected soon counts 1 more.
        for queue, below in ((self._wanted, np.inf), (self._expected, 1.0), (self._filling, 0.0)):
            while queue and self._slot[queue[0]] >= 0:
                queue.popleft()  # it has come for another reason
            if queue and not self._closed:
                owner = self._owner
                busy = self._pinned[owner] | ~self._ready[owner]
                worth = np.where(owner < 0, -1.0, np.where(busy, np.inf, self._score[owner] + self._soon[owner]))
                slot = int(worth.argmin())
                if worth[slot] < below:
                    return queue.popleft(), slot
        return None


def _open(file: Path) -> int:
    """The file, read past the page cache where the file system can."""
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(file, os.O_RDONLY)
