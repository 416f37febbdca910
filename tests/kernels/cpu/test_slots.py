"""Slots: what is wanted arrives and stays, what was used least leaves, and readers end with their owner."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hadal.kernels.cpu.slots import Slots
from hadal.kernels.cpu.target import CpuError

PAGE = 4096
BLOCKS = 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Blocks of a page, each full of its number, after a page of something else."""
    path = tmp_path / "blocks"
    path.write_bytes(bytes([255]) * PAGE + b"".join(bytes([i]) * PAGE for i in range(BLOCKS)))
    return path


def open_slots(file: Path, count: int) -> Slots:
    return Slots(file, [PAGE * (1 + i) for i in range(BLOCKS)], PAGE, count)


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers)


def content(slots: Slots, slot: int) -> set[int]:
    return set(memoryview(slots._memory)[slot * PAGE : (slot + 1) * PAGE])


def use(slots: Slots, *numbers: int) -> None:
    """Want blocks, see that each arrives as it is in the file, and release them; every one was used by a row."""
    left = keys(*numbers)
    slots.want(left)
    while len(left):
        found = slots.arrived(left)
        for key, slot in zip(left, found, strict=True):
            assert slot < 0 or content(slots, slot) == {key}
        slots.age(slice(0, BLOCKS), left[found >= 0], np.ones(int((found >= 0).sum())), 1)
        slots.release(left[found >= 0])
        left = left[found < 0]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_blocks_arrive_and_the_least_used_leave(file: Path) -> None:
    slots = open_slots(file, 3)
    for key in (0, 1, 2, 0):
        use(slots, key)
    assert slots.resident() == [0, 1, 2] and (slots.asked, slots.hits, slots.bytes_read) == (4, 1, 3 * PAGE)
    use(slots, 3)  # 1 was used once and longest ago
    assert slots.resident() == [0, 2, 3]
    use(slots, 4)
    assert slots.resident() == [0, 3, 4]
    for _ in range(3):
        use(slots, 3, 4)
    use(slots, 5)  # 0 was used twice, but not lately
    assert slots.resident() == [3, 4, 5]


def test_more_than_there_are_slots_come_one_after_the_other(file: Path) -> None:
    slots = open_slots(file, 2)
    use(slots, *range(BLOCKS))
    assert slots.bytes_read == BLOCKS * PAGE and len(slots.resident()) == 2


def test_what_is_wanted_stays_until_it_is_released(file: Path) -> None:
    slots = open_slots(file, 2)
    slots.want(keys(0, 1))
    wait_for(lambda: slots.resident() == [0, 1])
    slots.want(keys(2))
    slots.expect([3])
    time.sleep(0.02)
    assert slots.resident() == [0, 1]
    slots.release(keys(1))
    assert slots.arrived(keys(2)).tolist() == [1] and slots.resident() == [0, 2]


def test_what_is_expected_comes_and_stays_for_the_next_step(file: Path) -> None:
    slots = open_slots(file, 3)
    use(slots, 0, 1, 2)
    slots.expect([7, 8])
    wait_for(lambda: slots.bytes_read == 5 * PAGE)
    assert {7, 8} <= set(slots.resident())
    slots.want(keys(9))
    assert slots.arrived(keys(9))[0] >= 0
    assert slots.resident() == [7, 8, 9]
    slots.expect([])
    slots.release(keys(9))
    use(slots, 0)
    assert 9 in slots.resident() or 0 in slots.resident()


def test_expectations_never_put_out_what_is_expected(file: Path) -> None:
    slots = open_slots(file, 2)
    slots.expect(list(range(6)))
    wait_for(lambda: slots.bytes_read == 2 * PAGE)
    time.sleep(0.02)
    assert slots.resident() == [0, 1] and slots.bytes_read == 2 * PAGE


def test_filling_takes_empty_slots_alone(file: Path) -> None:
    slots = open_slots(file, 4)
    use(slots, 9)
    rate = slots.fill([0, 1, 2, 3, 4], 0.2)
    wait_for(lambda: len(slots.resident()) == 4)
    assert rate > 0 and slots.resident() == [0, 1, 2, 9] and slots.memory_rate() > 0


def test_readers_end_with_what_owns_them(file: Path) -> None:
    def readers() -> int:
        return sum(thread.name == "hadal-reader" for thread in threading.enumerate())

    gc.collect()
    before = readers()
    slots = open_slots(file, 2)
    use(slots, 1)
    assert readers() > before
    slots.close()
    gone = weakref.ref(slots)
    del slots
    wait_for(lambda: readers() == before)
    gc.collect()
    assert gone() is None


def test_a_file_that_cannot_be_read_is_an_error_and_no_hang(file: Path) -> None:
    slots = Slots(file, [PAGE, 1 << 30], PAGE, 2)
    slots.want(keys(0, 1))
    with pytest.raises(CpuError, match=r"packed weights cannot be read \(the file ends too early\); check the disk"):
        for _ in range(3):
            found = slots.arrived(keys(1))
            assert found[0] < 0


def test_memory_that_is_not_there_is_refused(file: Path) -> None:
    with pytest.raises(CpuError, match=r"GiB of memory for experts cannot be had .*; ask for less"):
        open_slots(file, 1 << 45)
