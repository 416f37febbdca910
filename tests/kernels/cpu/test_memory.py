"""Buffers, states whose full pages are shared, and packed weights that are kept on disk and rebuilt when torn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu import memory
from hadal.kernels.cpu.layout import Places
from hadal.kernels.cpu.memory import CpuState, Packing, Scratch, address, buffer, packed_weights
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


class Items:
    """Weights that count how often they are packed."""

    def __init__(self, sizes: tuple[int, ...] = (100, 64, 1)) -> None:
        self.packed = 0
        self.items = [Packing(f"w{i}", n, self.writer(i)) for i, n in enumerate(sizes)]

    def writer(self, i: int) -> Callable[[Tensor], None]:
        def write(out: Tensor) -> None:
            self.packed += 1
            out.fill_(i + 1)

        return write

    def check(self, identity: str | None) -> object:
        """Pack or map them; every byte must be what its writer wrote."""
        places, held = packed_weights(self.items, identity)
        for i, item in enumerate(self.items):
            offset = places[item.name] - address(held)
            assert places[item.name] % 64 == 0 and (np.asarray(held)[offset : offset + item.nbytes] == i + 1).all()
        return held


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which small models are kept, too."""
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "_KEEP_FROM", 1)
    return tmp_path / "weights"


def test_packed_weights_are_kept_and_mapped(folder: Path) -> None:
    items = Items()
    for _ in range(3):
        assert isinstance(items.check("model"), np.memmap)
    assert items.packed == 3 and len(list(folder.iterdir())) == 1
    items.check("another")
    Items((100, 64, 2)).check("model")
    assert items.packed == 6 and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("left", [0, 1, 5000])
def test_a_torn_file_is_written_anew(folder: Path, left: int) -> None:
    items = Items((100_000, 64))
    items.check("model")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    items.check("model")
    assert items.packed == 4 and file.read_bytes() == whole and list(folder.iterdir()) == [file]


def test_without_an_identity_or_below_a_size_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = Items()
    items.check(None)
    monkeypatch.setattr(memory, "_KEEP_FROM", 1 << 25)
    items.check("model")
    assert items.packed == 6 and not folder.exists()


def test_a_folder_that_cannot_be_written_is_done_without(folder: Path) -> None:
    folder.write_text("in the way")
    items = Items()
    assert not isinstance(items.check("model"), np.memmap)
    assert items.packed == 3


def test_a_disk_without_room_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    items = Items()
    assert not isinstance(items.check("model"), np.memmap)
    assert items.packed == 3 and not list(folder.iterdir())
