"""Packed weights kept on disk: rebuilt when torn, written within little memory, removed when there are too many."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from hadal.kernels.cpu import packed
from hadal.kernels.cpu.packed import PAGE, Packed, Packing, packed_weights
from hadal.kernels.cpu.target import CpuError


class Items:
    """Weights that count how often they are packed."""

    def __init__(self, sizes: tuple[int, ...] = (100, 64, 1), stack: int = 3) -> None:
        self.packed = 0
        self.items = [Packing(f"w{i}", n, self.writer(i)) for i, n in enumerate(sizes)]
        self.items.append(Packing("stack", PAGE, self.writer(50), stack))

    def writer(self, i: int) -> Callable[[Tensor, int], None]:
        def write(out: Tensor, number: int) -> None:
            self.packed += 1
            out.fill_(i + 1 + number)

        return write

    def check(self, identity: str | None, *, on_disk: bool = False) -> Packed:
        """Pack or map them; every byte must be what its writer wrote."""
        found = packed_weights(self.items, identity, on_disk=on_disk)
        for i, item in enumerate(self.items):
            begin = found.offset(item.name)
            assert begin % (PAGE if item.count > 1 else 64) == 0 and begin >= PAGE
            stack = np.asarray(found.held)[begin : begin + item.nbytes * item.count].reshape(item.count, -1)
            first = 51 if item.name == "stack" else i + 1
            assert (stack == first + np.arange(item.count)[:, None]).all()
        if found.file is not None:
            assert np.fromfile(found.file, np.uint8).tobytes() == np.asarray(found.held).tobytes()
        return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which small models are kept, too."""
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path))
    monkeypatch.delenv("HADAL_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(packed, "KEEP_FROM", 1)
    return tmp_path / "weights"


def test_packed_weights_are_kept_and_mapped(folder: Path) -> None:
    items = Items()
    for _ in range(3):
        assert isinstance(items.check("model").held, np.memmap)
    assert items.packed == 6 and len(list(folder.iterdir())) == 1
    items.check("another")
    Items((100, 64, 2)).check("model")
    Items(stack=4).check("model")
    assert items.packed == 12 and len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("left", [0, 1, 5000])
def test_a_torn_file_is_written_anew(folder: Path, left: int) -> None:
    items = Items((100_000, 64))
    items.check("model")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    items.check("model")
    assert items.packed == 10 and file.read_bytes() == whole and list(folder.iterdir()) == [file]


def test_a_file_of_the_right_size_without_the_first_page_is_written_anew(folder: Path) -> None:
    items = Items()
    file = items.check("model").file
    assert file is not None
    whole = file.read_bytes()
    assert whole.startswith(b"hadal packed weights") and file.stem in whole[:PAGE].decode()
    file.write_bytes(bytes(PAGE) + whole[PAGE:])  # as a power failure may leave it
    items.check("model")
    assert items.packed == 12 and file.read_bytes() == whole


def test_the_first_page_is_written_last(folder: Path) -> None:
    items, seen = Items(), []

    def look(out: Tensor, number: int) -> None:
        seen.extend(file.read_bytes()[:PAGE] for file in folder.iterdir())

    items.items.append(Packing("last", 1, look))
    packed_weights(items.items, "model")
    assert seen == [bytes(PAGE)]


def test_without_an_identity_or_below_a_size_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = Items()
    items.check(None)
    monkeypatch.setattr(packed, "KEEP_FROM", 1 << 25)
    items.check("model")
    assert items.packed == 12 and not folder.exists()
    assert items.check("model", on_disk=True).file is not None


def test_a_folder_that_cannot_be_written_is_done_without(folder: Path) -> None:
    folder.write_text("in the way")
    items = Items()
    assert items.check("model").file is None
    assert items.packed == 6
    with pytest.raises(CpuError, match=r"has no room for 0\.0 GiB of packed weights; set HADAL_CACHE"):
        items.check("model", on_disk=True)


def test_a_disk_without_room_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    items = Items()
    assert items.check("model").file is None
    assert items.packed == 6 and not list(folder.iterdir())


def test_the_least_recently_used_files_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for i, name in enumerate("abc"):
        files[name] = Items().check(name).file
        assert files[name] is not None
        os.utime(files[name], (i, i))
    held = Items().check("a").held  # now the last one used
    monkeypatch.setenv("HADAL_CACHE_LIMIT", str(3.5 * len(held) / 2**30))
    files["d"] = Items().check("d").file
    assert {name for name, file in files.items() if file.exists()} == {"a", "c", "d"}
    monkeypatch.setenv("HADAL_CACHE_LIMIT", "0")
    Items().check("a")  # what is there may be used
    Items().check("e")
    assert len(list(folder.iterdir())) == 1 and np.asarray(held)[PAGE] == 1


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HADAL_CACHE_LIMIT", text)
    with pytest.raises(CpuError, match=r"HADAL_CACHE_LIMIT is .*; give the GiB"):
        Items().check("model")


def test_little_memory_is_held_while_a_file_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_PIECE", 1 << 23)
    page, released, most = resource.getpagesize(), 0, 0

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def write(out: Tensor, number: int) -> None:
        nonlocal most
        out.fill_(number + 1)
        most = max(most, resident())

    def release() -> None:
        nonlocal released
        released += 1

    before = resident()
    packed_weights([Packing("stack", 1 << 21, write, 48)], "model", release=release)
    assert most - before < 1 << 24 and released >= 9
