"""The folder of stored prefixes: restarts, kills, flipped bits, budgets, full disks and owners."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hadal.engine import disk
from hadal.engine.disk import DiskError, DiskStore
from hadal.engine.prefix import PrefixStore
from hadal.kernels.pages import PagePool
from tests.engine.fake_state import FakeState, make_pool
from tests.engine.test_prefix import ids_of, make_store

ROOT = Path(__file__).parent.parent.parent


def opened(
    folder: Path, pool: PagePool, max_bytes: int = 1 << 30, model: str = "model", memory: int = 0
) -> PrefixStore:
    return make_store(pool, memory, DiskStore(folder, model, max_bytes))


def put(store: PrefixStore, pool: PagePool, tokens: list[int], tenant: str = "") -> None:
    store.put(tokens, FakeState(pool, tokens), tenant)
    store.flush()


def length(store: PrefixStore, tokens: list[int], tenant: str = "") -> int:
    found = store.lookup([*tokens, 1], tenant)
    if found.state is not None:
        found.state.check()
        assert found.state.ids == tokens[: found.length]
    return found.length


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.prefix"))


def conversation(store: PrefixStore, pool: PagePool, seed: int, turns: int = 4) -> list[list[int]]:
    tokens, ends = ids_of(seed, 1000), []
    for turn in range(turns):
        put(store, pool, tokens)
        ends.append(list(tokens))
        tokens = tokens + ids_of(seed + 100 + turn, 200)
    return ends


def test_a_conversation_writes_each_page_once_and_survives_a_restart(tmp_path: Path) -> None:
    pool = make_pool()
    store = opened(tmp_path, pool)
    ends = conversation(store, pool, 1)
    assert len(files(tmp_path)) == 4
    pages = [len(file.blocks) for file in sorted(store._disk.files.values(), key=lambda f: f.snapshot.position)]
    assert pages == [7, 2, 1, 2]  # full ones; 1,000 1,200 1,400 and 1,600 tokens
    store.close()
    store = opened(tmp_path, pool)
    assert [length(store, end) for end in ends] == [1000, 1200, 1400, 1600]
    assert store.stats()["bytes_disk"] == sum(p.stat().st_size for p in files(tmp_path))
    store.close()


def test_branches_share_the_pages_before_them(tmp_path: Path) -> None:
    pool = make_pool()
    store, trunk = opened(tmp_path, pool), ids_of(2, 2000)
    put(store, pool, trunk)
    for seed in (3, 4):
        put(store, pool, trunk[:1500] + ids_of(seed, 300))
    begins = sorted(file.begin for file in store._disk.files.values())
    assert begins == [0, 11, 11]
    assert length(store, trunk[:1500] + ids_of(4, 300)) == 1800
    store.close()


KILLED = """
import os, sys, time
from pathlib import Path
from tests.engine.test_disk import conversation, make_pool, opened, put, ids_of
folder, slow = Path(sys.argv[1]), int(sys.argv[2])
pool, fsync, calls = make_pool(), os.fsync, [0]
def slowly(fd):
    calls[0] += 1
    if calls[0] == slow:
        print("writing", flush=True)
        time.sleep(60)
    fsync(fd)
os.fsync = slowly
store = opened(folder, pool)
conversation(store, pool, 5)
print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("call, whole, torn", [(5, 2, 1), (6, 3, 0)])
def test_a_kill_in_the_middle_of_storing_loses_that_snapshot_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, call: int, whole: int, torn: int
) -> None:
    # Two calls per snapshot: the file before it gets its name, the folder after it.
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(call)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    pool = make_pool()
    with caplog.at_level(logging.WARNING):
        store = opened(tmp_path, pool)
    assert len(store._disk.torn) == store.stats()["disk_torn"] == torn
    assert [p for p in tmp_path.iterdir() if p not in files(tmp_path)] == []
    assert ("unfinished" in caplog.text and store._disk.torn[0] in caplog.text) if torn else not caplog.text
    ends = [1000 + 200 * turn for turn in range(4)]
    tokens = ids_of(5, 1000)
    for turn in range(4):
        assert length(store, tokens) == (ends[min(turn, whole - 1)] if whole else 0)
        tokens = tokens + ids_of(105 + turn, 200)
    conversation(store, pool, 5)  # and it goes on
    assert len(files(tmp_path)) == 4 and store.stats()["disk_failed"] == 0
    store.close()


def test_a_kill_at_any_moment_leaves_what_serves(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    code = KILLED.replace("conversation(store, pool, 5)", "print('go', flush=True); conversation(store, pool, 5, 200)")
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), "-1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        pool = make_pool()
        store = opened(tmp_path, pool)
        stats, tokens = store.stats(), ids_of(5, 1000)
        assert stats["disk_corrupt"] == 0 and stats["disk_torn"] <= 1
        for turn in range(stats["files_disk"]):
            assert length(store, tokens) == len(tokens)
            tokens = tokens + ids_of(105 + turn, 200)
        store.close()


@pytest.mark.parametrize("restart", [False, True])
def test_a_flipped_bit_anywhere_is_caught_and_the_answer_is_the_cold_one(tmp_path: Path, restart: bool) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pool = make_pool()
    store = opened(tmp_path / "whole", pool)
    ends = conversation(store, pool, 6)
    by_name = {file.name: file.snapshot.position for file in store._disk.files.values()}
    store.close()
    for trial in range(60):
        folder = tmp_path / f"{trial}"
        shutil.copytree(tmp_path / "whole", folder)
        if not restart:
            store = opened(folder, pool)
        path = rng.choice(files(folder))
        content = bytearray(path.read_bytes())
        header = content.index(b"\n") + 1
        # The first line, every page and the home are hit alike.
        place = rng.randrange(header) if trial % 2 else rng.randrange(header, len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        if restart:
            store = opened(folder, pool)
        hurt = by_name[path.name]
        found = store.lookup([*ends[-1], 1])
        if place < header or found.length < 1600:
            assert store.stats()["disk_corrupt"] == 1 and not path.exists()
            assert found.length == max((len(end) for end in ends if len(end) < hurt), default=0)
            assert found.reason == "hit" if found.length else restart or found.reason == "corrupt"
        else:  # a home or open page that only its own snapshot needs
            assert store.stats()["disk_corrupt"] == 0
            own = next(end for end in ends if len(end) == hurt)
            assert length(store, own) < hurt
            assert store.stats()["disk_corrupt"] == 1 and not path.exists()
        if found.state is not None:
            found.state.check()
        store.close()


def test_a_damaged_prefix_is_a_miss_called_corrupt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool()
    store, tokens = opened(tmp_path, pool), ids_of(7, 300)
    put(store, pool, tokens)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    found = store.lookup([*tokens, 1])
    assert (found.state, found.length, found.reason) == (None, 0, "corrupt")
    assert store.stats()["disk_corrupt"] == store.stats()["miss_corrupt"] == 1
    assert path.name in caplog.text and pool.live == 0
    put(store, pool, tokens)
    assert length(store, tokens) == 300
    store.close()


def test_a_file_under_another_ones_name_is_not_served(tmp_path: Path) -> None:
    pool = make_pool()
    store, a, b = opened(tmp_path, pool), ids_of(8, 300), ids_of(9, 300)
    put(store, pool, a)
    put(store, pool, b)
    store.close()
    one, two = files(tmp_path)
    shutil.copy(one, two)
    store = opened(tmp_path, pool)
    assert store.stats()["disk_corrupt"] == 1 and len(files(tmp_path)) == 1
    assert sorted((length(store, a), length(store, b))) == [0, 300]
    store.close()


def test_what_builds_on_a_lost_file_goes_too(tmp_path: Path) -> None:
    pool = make_pool()
    store = opened(tmp_path, pool)
    ends = conversation(store, pool, 10)
    first = next(file.name for file in store._disk.files.values() if not file.begin)
    store.close()
    (tmp_path / first).unlink()
    store = opened(tmp_path, pool)
    assert len(store._disk.torn) == 3 and files(tmp_path) == [] and store.stats()["bytes_disk"] == 0
    assert store.lookup([*ends[-1], 1]).reason == "empty"
    store.close()


def test_the_least_recently_used_goes_first_and_never_before_what_builds_on_it(tmp_path: Path) -> None:
    pool = make_pool()
    store = opened(tmp_path, pool)
    a, b = conversation(store, pool, 11, 3), conversation(store, pool, 12, 3)
    assert length(store, a[1]) == 1200
    most = store.stats()["bytes_disk"] - 1
    store.close()
    store = opened(tmp_path, pool, most)  # it remembers the use: the oldest is the end of a
    assert [length(store, end) for end in a] == [1000, 1200, 1200]
    assert [length(store, end) for end in b] == [1000, 1200, 1400]
    for seed in range(200, 240):
        put(store, pool, ids_of(seed, 500))
        stats = store.stats()
        assert stats["bytes_disk"] <= most
        assert stats["bytes_disk"] == sum(p.stat().st_size for p in files(tmp_path))
        assert length(store, b[0]) == 1000  # in use, so it stays
    assert stats["disk_evicted"] > 20 and length(store, a[0]) == 0
    assert {f.parent for f in store._disk.files.values() if f.begin} <= set(store._disk.files)
    store.close()


def test_a_hit_in_memory_counts_as_use_on_disk(tmp_path: Path) -> None:
    pool = make_pool()
    store, a, b = opened(tmp_path, pool, memory=1 << 30), ids_of(35, 300), ids_of(36, 300)
    put(store, pool, a)
    put(store, pool, b)
    assert store.lookup([*a, 1]).source == "memory"
    most = store.stats()["bytes_disk"] - 1
    store.close()
    store = opened(tmp_path, pool, most)
    assert (length(store, a), length(store, b)) == (300, 0)
    store.close()


def test_only_ends_of_chains_are_evicted(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng, pool, kept, store = random.Random(seed), make_pool(), [ids_of(32, 300)], None
    for step in range(150):
        if store is None or step % 30 == 0:
            if store is not None:
                store.close()
            for path in files(tmp_path):  # whatever a copy or a clock makes of them
                os.utime(path, ns=(step, rng.randrange(1 << 40)))
            store = make_store(pool, 0, DiskStore(tmp_path, "model", 60_000 if step % 60 else 50_000))
            vanished, before, at_start = 0, set(store._disk.files), store.stats()["disk_evicted"]
            assert len(files(tmp_path)) == len(before) and store.stats()["disk_torn"] == 0
        tokens = rng.choice(kept)
        if rng.random() < 0.5:
            length(store, tokens)
        else:
            kept.append(tokens[: rng.randrange(100, len(tokens) + 1)] + ids_of(step, rng.randrange(1, 300)))
            put(store, pool, kept[-1])
        after = set(store._disk.files)
        vanished += len(before - after)
        before = after
        assert store.stats()["disk_evicted"] - at_start >= vanished
        by_name = store._disk.files
        assert all(f.used <= by_name[f.parent].used for f in by_name.values() if f.begin)
    assert store is not None and store.stats()["disk_evicted"] > 5
    store.close()


def test_a_file_cut_short_is_noticed_when_the_folder_is_opened(tmp_path: Path) -> None:
    pool = make_pool()
    store = opened(tmp_path, pool)
    put(store, pool, ids_of(31, 300))
    store.close()
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    store = opened(tmp_path, pool)
    assert store.stats()["disk_corrupt"] == 1 and files(tmp_path) == []
    store.close()


def test_what_does_not_fit_is_skipped_and_drops_nobody(tmp_path: Path) -> None:
    pool = make_pool()
    store, small = opened(tmp_path, pool, 20_000), ids_of(13, 200)
    put(store, pool, small)
    put(store, pool, ids_of(14, 10_000))
    assert store.stats()["disk_skipped"] == 1 and store.stats()["disk_evicted"] == 0
    assert length(store, small) == 200
    store.close()


def test_another_models_files_only_take_up_room(tmp_path: Path) -> None:
    pool = make_pool()
    store, tokens = opened(tmp_path, pool, model="older"), ids_of(15, 300)
    put(store, pool, tokens)
    size = store.stats()["bytes_disk"]
    store.close()
    store = opened(tmp_path, pool, 2 * size)
    assert store.lookup([*tokens, 1]).reason == "empty"
    assert store.stats()["bytes_disk"] == size
    put(store, pool, tokens)
    assert store.stats()["disk_evicted"] == 0
    put(store, pool, ids_of(16, 300))
    assert store.stats()["disk_evicted"] == 1 and length(store, tokens) == 300
    store.close()
    store = opened(tmp_path, pool, model="older")
    assert store.lookup([*tokens, 1]).reason == "empty"
    store.close()


def test_tenants_share_nothing_on_disk(tmp_path: Path) -> None:
    pool = make_pool()
    store, tokens = opened(tmp_path, pool), ids_of(17, 300)
    put(store, pool, tokens, "alice")
    assert store.lookup([*tokens, 1], "bob").reason == "empty"
    put(store, pool, tokens, "bob")
    assert len(files(tmp_path)) == 2 and length(store, tokens, "bob") == 300
    assert b"alice" not in b"".join(path.read_bytes() for path in files(tmp_path))
    store.close()


def test_one_process_at_a_time_owns_a_folder(tmp_path: Path) -> None:
    pool = make_pool()
    store = opened(tmp_path, pool)
    with pytest.raises(DiskError, match=rf"{tmp_path}.*another process.*another folder"):
        opened(tmp_path, pool)
    store.close()
    opened(tmp_path, pool).close()


def test_a_full_disk_is_counted_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool()
    store = opened(tmp_path, pool, memory=1 << 30)
    fsync = os.fsync

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "fsync", full)
    for seed in (18, 19):
        put(store, pool, ids_of(seed, 300))
    assert store.stats()["disk_failed"] == 2 and list(tmp_path.iterdir()) == []
    assert len([r for r in caplog.records if "No space" in r.message]) == 1
    assert length(store, ids_of(18, 300)) == 300  # from memory
    monkeypatch.setattr(disk.os, "fsync", fsync)
    put(store, pool, ids_of(20, 300))
    assert store.stats()["disk_written"] == 1
    store.close()


def test_a_folder_that_cannot_be_opened_does_not_stop_the_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    pool = make_pool()
    store = opened(tmp_path / "file", pool, memory=1 << 30)
    put(store, pool, ids_of(21, 300))
    assert length(store, ids_of(21, 300)) == 300
    assert store.stats()["disk_failed"] == 2 and len(caplog.records) == 1
    store.close()


def test_storing_never_waits_and_what_is_too_much_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(disk.os, "fsync", lambda fd: gate.wait(20) and fsync(fd))
    pool = make_pool()
    store = make_store(pool, 0, DiskStore(tmp_path, "model", 1 << 30, queue=2))
    sequences = [ids_of(seed, 200) for seed in range(22, 27)]
    store.put(sequences[0], FakeState(pool, sequences[0]))
    while store._disk._writing is None:
        time.sleep(0.001)
    for tokens in sequences[1:]:
        store.put(tokens, FakeState(pool, tokens))
    assert store.stats()["disk_skipped"] == 2
    assert len(store.states()) == 3 and pool.live == 6
    assert store.shrink(10) == 4 and len(store.states()) == 1  # those that only wait are given up
    gate.set()
    store.flush()
    assert pool.live == 0
    assert [length(store, tokens) for tokens in sequences] == [200, 0, 0, 0, 0]
    store.close()


def test_what_is_written_holds_no_pages(tmp_path: Path) -> None:
    pool = make_pool()
    store, a, b = opened(tmp_path, pool, memory=1 << 30), ids_of(37, 300), ids_of(38, 300)
    for count, tokens in enumerate((a, b), 1):
        store.put(tokens, FakeState(pool, tokens))
        while store.stats()["disk_written"] < count or store._disk._writing is not None:
            time.sleep(0.001)
    assert store.shrink(1) == 3 == pool.live
    assert [store.lookup([*tokens, 1]).source for tokens in (b, a)] == ["memory", "disk"]
    store.close()


def test_a_parent_that_is_skipped_does_not_hurt_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(disk.os, "fsync", lambda fd: gate.wait(20) and fsync(fd))
    pool = make_pool()
    store = make_store(pool, 0, DiskStore(tmp_path, "model", 1 << 30, queue=1))
    other, tokens = ids_of(28, 200), ids_of(29, 1000)
    store.put(other, FakeState(pool, other))
    while store._disk._writing is None:
        time.sleep(0.001)
    store.put(tokens[:500], FakeState(pool, tokens[:500]))
    store.put(tokens, FakeState(pool, tokens))
    gate.set()
    store.flush()
    assert store.stats()["disk_skipped"] == 1 and length(store, tokens) == 1000
    store.close()


def test_a_snapshot_whose_parent_turns_out_damaged_while_it_is_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool()
    store, tokens = opened(tmp_path, pool), ids_of(30, 1000)
    put(store, pool, tokens[:500])
    gate, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(disk.os, "fsync", lambda fd: gate.wait(20) and fsync(fd))
    store.put(tokens, FakeState(pool, tokens))
    while not list(tmp_path.glob("*.part")):
        time.sleep(0.001)
    files(tmp_path)[0].write_bytes(b"")
    assert length(store, tokens[:500]) == 0
    gate.set()
    store.flush()
    assert list(tmp_path.iterdir()) == [] and store.stats()["files_disk"] == 0
    store.close()
