"""Buffers and states whose full pages are shared."""

from __future__ import annotations

import torch

from hadal.kernels.cpu.layout import Places
from hadal.kernels.cpu.memory import CpuState, Scratch, address, buffer
from hadal.kernels.pages import PAGE_TOKENS, PagePool


def test_buffers_begin_on_a_cache_line() -> None:
    for nbytes in (1, 63, 64, 1000):
        array = buffer(nbytes)
        assert len(array) == nbytes and address(array) % 64 == 0 and not array.any()
    assert address(torch.zeros(3)) > 0


def test_scratch_grows_and_never_shrinks() -> None:
    scratch = Scratch()
    small = scratch.reserve(10)
    assert scratch.reserve(64) == small
    large = scratch.reserve(10_000)
    assert scratch.reserve(9_000) == large == scratch.address and large % 64 == 0


def state() -> CpuState:
    return CpuState(Places([], 256, 128), PagePool(128), buffer(256))


def test_pages_are_added_as_a_sequence_grows() -> None:
    s = state()
    for end, pages in ((1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2), (40 * PAGE_TOKENS, 40)):
        s.extend(end)
        assert len(s.pages) == pages
        assert s.table[:pages].tolist() == [p.address for p in s.pages]
    assert s.nbytes() == 256 + 40 * 128 + s.table.nbytes


def test_a_copy_shares_full_pages_and_nothing_else() -> None:
    s = state()
    s.extend(3 * PAGE_TOKENS)
    s.position, s.draft_position = 2 * PAGE_TOKENS + 5, 7
    s.home[:] = 3
    copy = s.clone()
    assert [a is b for a, b in zip(s.pages, copy.pages, strict=True)] == [True, True, False]
    assert copy.table[:3].tolist() == [p.address for p in copy.pages]
    assert (copy.position, copy.draft_position) == (s.position, 7)
    copy.pages[2].bytes[:], copy.home[:] = 9, 9
    assert not s.pages[2].bytes.any() and (s.home == 3).all()
    copy.extend(4 * PAGE_TOKENS)
    assert len(s.pages) == 3


def test_a_rewound_state_leaves_the_pages_of_its_copies_alone() -> None:
    s = state()
    s.extend(2 * PAGE_TOKENS)
    s.position = 2 * PAGE_TOKENS
    copy, shared = s.clone(), s.pages[1]
    s.rewind(3)
    assert s.position == 2 * PAGE_TOKENS - 3 and s.pages[1] is not shared and copy.pages[1] is shared
    assert s.table[:2].tolist() == [p.address for p in s.pages]
    own = s.pages[1]
    s.rewind(5)
    assert s.pages[1] is own  # nobody else had it
    s.rewind(0)
    assert s.rewindable == 8
    s.rewind(8)
    assert s.rewindable == s.clone().rewindable == 0  # sixteen tokens behind the furthest one
    s.position += 5
    assert s.rewindable == 5
    first = state()
    first.extend(1)
    first.position = 1
    first.rewind(1)
    assert first.position == 0 and not first.pages
