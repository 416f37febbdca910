"""The thread team: every thread walks through every job, nobody passes a barrier early, sleepers are woken."""

from __future__ import annotations

import functools
import os
import time

import numpy as np
import pytest

from hadal.kernels.cpu import team as teams
from hadal.kernels.cpu.ir import I64
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.target import Isa, Library
from hadal.kernels.cpu.team import Team, team
from tests.kernels.cpu.harness import address, instruction_sets

ITEMS = 100
ISA = Isa(instruction_sets()[0])


@functools.cache
def library() -> tuple[Library, KernelModule]:
    """`spread` adds a neighbour's value to each item; `note` counts the threads that came by."""
    module = KernelModule(ISA, ["rounds"])
    with module.kernel("spread", "source target") as k:
        f = k.f
        for i in k.share(ITEMS):
            far = (i * 37 + 11) % ITEMS
            total = f.load(I64, k.ptr("source"), i * 8) * 3 + f.load(I64, k.ptr("source"), far * 8)
            f.store(total + k.step("rounds"), k.ptr("target"), i * 8)
    with module.kernel("note", "counts") as k:
        f = k.f
        place = f.at(k.ptr("counts"), f["thread"] * 8)
        f.store(f.load(I64, place) + f["threads"], place)
    return Library(module.text(), ISA), module


class Program:
    """Values bounce between two buffers, job by job; a job that starts early reads what is not there yet."""

    def __init__(self, length: int) -> None:
        compiled, _ = library()
        self.values, self.counts = np.zeros((2, ITEMS), np.int64), np.zeros(8, np.int64)
        self.arguments = [np.array([address(self.values[i]), address(self.values[1 - i])]) for i in range(2)]
        self.arguments.append(np.array([address(self.counts)]))
        spread, note = compiled.address("spread"), compiled.address("note")
        jobs = [(spread, address(self.arguments[i % 2]), 1) for i in range(length)]
        self.jobs = np.array([(note, address(self.arguments[2]), 0), *jobs], np.int64)
        self.step = np.zeros(1, np.int64)

    def run(self, by: Team, threads: int, rounds: int) -> int:
        self.values[0] = np.arange(ITEMS) + rounds
        self.values[1] = -1
        self.counts[:] = 0
        self.step[0] = rounds
        return by.run(self.jobs, len(self.jobs), self.step, threads)

    def expected(self, rounds: int) -> np.ndarray:
        values = np.arange(ITEMS) + rounds
        for _ in range(len(self.jobs) - 1):
            values = values * 3 + values[(np.arange(ITEMS) * 37 + 11) % ITEMS] + rounds
        return values

    def result(self) -> np.ndarray:
        return np.array(self.values[(len(self.jobs) - 1) % 2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    program, ours = Program(20), Team(ISA)
    for rounds in range(50):
        took_part = program.run(ours, threads, rounds)
        assert np.array_equal(program.result(), program.expected(rounds)), rounds
        assert 1 <= took_part <= threads
        assert program.counts.tolist() == [took_part] * took_part + [0] * (8 - took_part)


def test_runs_in_quick_succession_leave_nobody_behind() -> None:
    program, ours = Program(1), Team(ISA)
    expected = program.expected(1)
    together = 0
    for _ in range(3000):
        together += program.run(ours, 3, 1) > 1
        assert np.array_equal(program.result(), expected)
    # A helper stuck in an old barrier would never come again.
    deadline = time.monotonic() + 20
    while program.run(ours, 3, 1) < 3:
        assert time.monotonic() < deadline, "a helper is lost"
        time.sleep(0.001)
    assert together


def test_a_sleeping_helper_is_woken_for_the_next_run() -> None:
    program, ours = Program(4), Team(ISA)
    expected = program.expected(2)
    for _ in range(4):
        deadline = time.monotonic() + 20
        while any(slot[0] for slot in ours._slots):  # all asleep
            assert time.monotonic() < deadline, "a helper does not fall asleep"
            time.sleep(0.002)
        took_part: list[int] = []
        while not took_part or took_part[-1] < 2:
            took_part.append(program.run(ours, 2, 2))
            assert np.array_equal(program.result(), expected)
            assert time.monotonic() < deadline + 20, "a helper does not wake"
            time.sleep(0.0005)


def test_a_barrier_holds_faster_threads_back() -> None:
    program, ours = Program(400), Team(ISA)
    for rounds in range(40):
        program.run(ours, 3, rounds)
        assert np.array_equal(program.result(), program.expected(rounds))


def test_fewer_threads_may_be_asked_for_later() -> None:
    program, ours = Program(3), Team(ISA)
    for threads in (3, 1, 2, 3, 1):
        assert program.run(ours, threads, 5) <= threads
        assert np.array_equal(program.result(), program.expected(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_hires_its_own_helpers() -> None:
    program, ours = Program(5), Team(ISA)
    program.run(ours, 2, 1)
    child = os.fork()
    if not child:
        program.run(ours, 2, 3)
        os._exit(0 if np.array_equal(program.result(), program.expected(3)) else 1)
    deadline = time.monotonic() + 20
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child waits for its parent's helper")
        time.sleep(0.01)
    assert status == 0


def test_a_process_has_one_team_per_instruction_set() -> None:
    assert team(ISA) is team(Isa(ISA.name))
    assert teams._teams[ISA] is team(ISA)
