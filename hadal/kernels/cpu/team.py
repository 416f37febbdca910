"""Team: the threads that walk through a program together, and the native entry points they use.

The caller is thread 0. A helper sits in the emitted `serve`, outside the interpreter's lock, and falls asleep after
about a millisecond without work; a run takes along whoever is awake and wakes the others for the next one, because
waiting for a sleeper costs more than doing its share.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import torch

from hadal.kernels.cpu.program import JOB_WORDS, emit_runner
from hadal.kernels.cpu.ir import Module
from hadal.kernels.cpu.target import Isa, Library

SPINS = 40_000  # turns of `serve` before a helper without work falls asleep
_LINE = 16  # words between the slots of two helpers

_teams: dict[Isa, Team] = {}
_lock = threading.Lock()


class Team:
    """Runs programs on up to `torch.get_num_threads()` threads; one run at a time."""

    def __init__(self, isa: Isa) -> None:
        module = Module()
        emit_runner(module, isa)
        self._library = Library(module.text(), isa)
        self._run = self._function("run", 6)
        self._serve = self._function("serve", 2)
        self._engage = self._function("engage", 2)
        self._slots: list[Any] = []
        self._events: list[threading.Event] = []
        self._busy = threading.Lock()
        self._flag = np.zeros(1, np.int64)
        self._barrier = _words(_LINE)

    def run(self, jobs: np.ndarray, count: int, step: np.ndarray, threads: int | None = None) -> int:
        """Run the first `count` jobs of [*, 3] words for a step; returns how many threads took part."""
        assert jobs.dtype == np.int64 and jobs.shape[1] == JOB_WORDS and jobs.flags.c_contiguous
        with self._busy:
            wanted = torch.get_num_threads() if threads is None else threads
            while len(self._slots) < wanted - 1:
                self._hire()
            engaged = [i for i in range(wanted - 1) if self._engaged(i)]
            self._barrier[0] = 0
            arguments = (jobs.ctypes.data, count, step.ctypes.data, self._barrier.ctypes.data)
            total = 1 + len(engaged)
            for number, i in enumerate(engaged):
                slot = self._slots[i]
                slot[1:7] = (1 + number, arguments[0], count, arguments[2], arguments[3], total)
                slot[0] = 3  # written last; the slot is aligned, so the helper sees a whole word
            self._run(*arguments, 0, total)
            return total

    def _engaged(self, i: int) -> bool:
        self._engage(self._slots[i].ctypes.data, self._flag.ctypes.data)
        if not self._flag[0]:
            self._events[i].set()
        return bool(self._flag[0])

    def _hire(self) -> None:
        slot, event = _words(_LINE), threading.Event()
        slot[0] = 1
        self._slots.append(slot)
        self._events.append(event)
        threading.Thread(target=self._help, args=(slot, event), daemon=True, name="hadal-kernels").start()

    def _help(self, slot: np.ndarray, event: threading.Event) -> None:
        while True:
            self._serve(slot.ctypes.data, SPINS)
            event.wait()
            event.clear()
            slot[0] = 1

    def _function(self, name: str, arguments: int) -> Any:
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(self._library.address(name))


def team(isa: Isa) -> Team:
    """The process's team for an instruction set."""
    with _lock:
        if isa not in _teams:
            _teams[isa] = Team(isa)
        return _teams[isa]


def _words(count: int) -> np.ndarray:
    """Words that begin on a cache line."""
    raw = np.zeros(count + 8, np.int64)
    offset = -raw.ctypes.data % 64 // 8
    return raw[offset : offset + count]
