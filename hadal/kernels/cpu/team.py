"""Team: the threads that walk through a program together, and the native entry points they use.

The caller is thread 0. A helper sits in the emitted `serve`, outside the interpreter's lock, and falls asleep after
some milliseconds without work; a run takes along whoever is awake and wakes the others for the next one, because
waiting for a sleeper costs more than doing its share.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import numpy as np
import torch

from hadal.kernels.cpu.ir import Module
from hadal.kernels.cpu.program import JOB_WORDS, emit_runner
from hadal.kernels.cpu.target import Isa, Library

SPINS = 200_000  # turns of `serve`, some milliseconds, before a helper without work falls asleep
_MOST_ALONE = 127  # runs without helpers after they were late again and again
_LINE = 16  # words between the slots of two helpers

_teams: dict[Isa, Team] = {}
_lock = threading.Lock()


class Team:
    """Runs programs on up to `torch.get_num_threads()` threads; one run at a time."""

    def __init__(self, isa: Isa) -> None:
        module = Module()
        emit_runner(module, isa)
        self._library = Library(module.text(), isa)
        self._lead = self._function("lead", 7)
        self._serve = self._function("serve", 2)
        self._slots: list[np.ndarray] = []
        self._places, self._places_address = np.zeros(0, np.int64), 0
        self._events: list[threading.Event] = []
        self._busy = threading.Lock()
        self._result, self._barrier = np.ones(2, np.int64), _words(_LINE)
        self._addresses = self._barrier.ctypes.data, self._result.ctypes.data
        self._alone = self._patience = 0  # runs still to be made without helpers, and how many the last lateness cost
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._dismiss)

    def run(self, jobs: np.ndarray, count: int, step: np.ndarray, threads: int | None = None) -> int:
        """Run the first `count` jobs of [*, 3] words for a step; returns how many threads took part."""
        assert jobs.dtype == np.int64 and jobs.shape[1] == JOB_WORDS and jobs.flags.c_contiguous
        assert threads == 1 or not count or jobs[count - 1, 2], (
            "without a barrier at the end a helper may still be at work"
        )
        return self.run_at(jobs.ctypes.data, count, step.ctypes.data, threads)

    def run_at(self, jobs: int, count: int, step: int, threads: int | None = None) -> int:
        """As `run`, for whoever knows the addresses; numpy takes long to tell them."""
        with self._busy:
            helpers = (torch.get_num_threads() if threads is None else threads) - 1
            if threads is None and self._alone:
                self._alone -= 1
                helpers = 0
            while len(self._slots) < helpers:
                self._hire()
            for slot, event in zip(self._slots[:helpers], self._events, strict=False):
                if not slot[0]:
                    event.set()
            self._lead(self._places_address, helpers, jobs, count, step, *self._addresses)
            if threads is None and self._result[0] > 1:
                # A core that others need makes every barrier wait for the scheduler; alone the work is done sooner.
                self._patience = min(2 * self._patience + 1, _MOST_ALONE) if self._result[1] else self._patience // 2
                self._alone = self._patience
            return int(self._result[0])

    def _hire(self) -> None:
        slot, event = _words(_LINE), threading.Event()
        slot[0] = 1
        # Started before it can be engaged: where no thread may be started nobody must wait for it.
        threading.Thread(target=self._help, args=(slot, event), daemon=True, name="hadal-kernels").start()
        self._slots.append(slot)
        self._events.append(event)
        self._places = np.array([s.ctypes.data for s in self._slots], np.int64)
        self._places_address = self._places.ctypes.data

    def _help(self, slot: np.ndarray, event: threading.Event) -> None:
        while True:
            self._serve(slot.ctypes.data, SPINS)
            event.wait()
            event.clear()
            slot[0] = 1

    def _dismiss(self) -> None:
        """A forked child has none of its parent's threads."""
        self._slots, self._events, self._busy = [], [], threading.Lock()

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
