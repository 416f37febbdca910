"""The prefix store against a list of everything that was stored, and its budgets, order, reasons and tenants."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.engine import prefix
from hadal.engine.disk import DiskStore
from hadal.engine.prefix import PrefixStore
from hadal.kernels.pages import PagePool
from tests.engine.fake_state import PAGE_BYTES, FakeState, make_pool, restorer


def ids_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 129280, count).tolist()


def make_store(pool: PagePool, memory_bytes: int = 1 << 30, disk: DiskStore | None = None) -> PrefixStore:
    return PrefixStore(memory_bytes=memory_bytes, pool=pool, restore=restorer(pool), disk=disk)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def expected_length(stored: list[list[int]], tokens: list[int], limit: int) -> int:
    """The longest usable prefix by direct comparison with everything stored."""
    best = 0
    for other in stored:
        length = min(common(other, tokens), limit)
        if length >= len(other) - 8:
            best = max(best, length)
    return best


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """Tokens on a small tree: branches leave it near block borders, ends lie near them too, so that many share much."""
    near = st.one_of(st.integers(1, 20), st.sampled_from([k * 128 + d for k in (1, 2, 3) for d in range(-10, 11)]))
    tokens: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        branch, end = draw(st.integers(0, 2)), draw(near)
        tokens += [(len(tokens) + i) * 7 % 1000 + branch for i in range(max(end - len(tokens), 1))]
    return tokens


operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "lookup", "lookup", "observe", "restart"]),
        sequences(),
        st.sampled_from(["", "b"]),
        st.integers(0, 400),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=operations, memory_bytes=st.sampled_from([0, 5 * PAGE_BYTES, 1 << 30]), on_disk=st.booleans())
def test_the_store_agrees_with_a_list_of_everything_stored(
    tmp_path_factory: pytest.TempPathFactory, steps: list, memory_bytes: int, on_disk: bool
) -> None:
    pool, folder = make_pool(), tmp_path_factory.mktemp("store")

    def opened() -> PrefixStore:
        disk = DiskStore(folder, "model", 1 << 30, queue=100) if on_disk else None
        return make_store(pool, memory_bytes if on_disk else 1 << 30, disk)

    store = opened()
    stored: dict[str, list[list[int]]] = {"": [], "b": []}
    seen: dict[str, list[list[int]]] = {"": [], "b": []}
    for what, tokens, tenant, limit in steps:
        if what == "put":
            store.put(tokens, FakeState(pool, tokens), tenant)
            stored[tenant].append(tokens)
            seen[tenant].append(tokens)
        elif what == "observe":
            store.observe(tokens, tenant)
            seen[tenant].append(tokens)
        elif what == "restart" and on_disk:
            store.close()
            assert pool.live == 0
            store = opened()
            seen = {tenant: list(kept) for tenant, kept in stored.items()}
        elif what == "lookup":
            store.flush()
            limit = min(limit, len(tokens))
            found = store.lookup(tokens, tenant, limit)
            shared = max((min(common(s, tokens), limit) // 128 * 128 for s in seen[tenant]), default=0)
            assert (found.length, found.shared) == (expected_length(stored[tenant], tokens, limit), shared)
            if found.length:
                assert found.reason == "hit" and found.source == ("memory" if not on_disk else found.source or "?")
                assert found.state.ids == tokens[: found.length]
                found.state.check()
                found.state.extend([1, 2, 3])  # it is the caller's own; what is stored must not change
            else:
                want = "no_snapshot" if shared else "no_common_prefix" if stored[tenant] else "empty"
                assert (found.state, found.source, found.reason) == (None, "", want if limit else "short")
            del found
    assert all(state.check() is None for state in store.states())
    store.close()
    assert pool.live == 0


def test_a_snapshot_serves_up_to_eight_tokens_less_and_never_more() -> None:
    pool = make_pool()
    store, tokens = make_store(pool), ids_of(1, 300)
    store.put(tokens, FakeState(pool, tokens))
    assert store.lookup([*tokens, 5]).length == 300
    assert store.lookup(tokens).length == 299
    assert store.lookup(tokens, limit=300).length == 300
    assert store.lookup(tokens, limit=292).length == 292
    assert store.lookup(tokens, limit=291).reason == "no_snapshot"
    assert store.lookup([*tokens[:292], 1, 2]).length == 292
    assert store.lookup([*tokens[:291], -1, 2]).length == 0


def test_a_branch_beyond_a_block_border_does_not_hide_the_longer_one_before_it() -> None:
    pool = make_pool()
    store, tokens = make_store(pool), ids_of(33, 300)
    branch = [*tokens[:130], *ids_of(34, 6)]
    for stored in (branch, tokens[:135]):
        store.put(stored, FakeState(pool, stored))
    assert store.lookup(tokens).length == 135
    assert store.lookup([*branch, 1]).length == 136


def test_a_state_that_can_forget_less_serves_less() -> None:
    class Stiff(FakeState):
        rewindable = 2

    pool = make_pool()
    store, tokens = make_store(pool), ids_of(2, 130)
    store.put(tokens, Stiff(pool, tokens))
    assert store.lookup([*tokens[:127], -1, -1]).length == 0
    assert store._find(np.array(tokens, "<i4"), store._chain(np.array(tokens[:130], "<i4"), ""), 129).reason == "hit"


def test_tenants_share_nothing_and_learn_nothing_of_each_other() -> None:
    pool = make_pool()
    store, tokens = make_store(pool), ids_of(3, 600)
    store.put(tokens, FakeState(pool, tokens), "alice")
    found = store.lookup([*tokens, 1], "bob")
    assert (found.state, found.length, found.shared, found.reason) == (None, 0, 0, "empty")
    own = ids_of(4, 200)
    store.put(own, FakeState(pool, own), "bob")
    assert store.lookup([*tokens, 1], "bob").reason == "no_common_prefix"
    assert store.lookup([*tokens, 1], "alice").length == 600


def test_every_miss_has_its_reason() -> None:
    pool = make_pool()
    store, tokens = make_store(pool, 6 * PAGE_BYTES), ids_of(5, 300)
    assert store.lookup([7]).reason == "short"
    assert store.lookup([]).reason == "short"
    assert store.lookup(tokens).reason == "empty"
    store.observe(tokens)
    assert store.lookup(tokens).reason == "no_snapshot"
    store.put(tokens, FakeState(pool, tokens))
    assert store.lookup(ids_of(6, 300)).reason == "no_common_prefix"
    assert store.lookup([*tokens[:200], *ids_of(7, 9)]).reason == "no_snapshot"
    other = ids_of(8, 500)
    store.put(other, FakeState(pool, other))
    assert store.lookup(tokens).reason == "evicted"
    assert store.lookup([*tokens[:200], *ids_of(7, 9)]).reason == "no_snapshot"
    stats = store.stats()
    assert stats["lookups"] == 8 and stats["miss_short"] == 2 and stats["miss_evicted"] == 1 and stats["evicted"] == 1
    assert sum(count for name, count in stats.items() if name.startswith(("miss_", "hit_"))) == stats["lookups"]


def test_a_shared_prefix_is_found_at_a_block_border() -> None:
    pool = make_pool()
    store, system = make_store(pool), ids_of(9, 1000)
    store.observe([*system, *ids_of(10, 50)], "t")
    found = store.lookup([*system, *ids_of(11, 50)], "t")
    assert (found.length, found.shared, found.reason) == (0, 896, "no_snapshot")
    store.put(system[:896], FakeState(pool, system[:896]), "t", "common")
    found = store.lookup([*system, *ids_of(12, 50)], "t")
    assert (found.length, found.shared) == (896, 896)
    assert store.lookup([*system], "t", limit=895).shared == 768


def test_pages_count_once_and_the_least_recently_used_goes_first() -> None:
    pool = make_pool()
    store = make_store(pool, 10 * PAGE_BYTES + 3 * 10)
    a, b = ids_of(13, 512), ids_of(14, 256)
    state = FakeState(pool, a[:256], padding=10)
    store.put(a[:256], state.clone())
    store.put(a, state.extend(a[256:]).clone())  # shares two pages
    assert store.nbytes == 4 * PAGE_BYTES + 20 == store.stats()["bytes_memory"]
    store.put(b, FakeState(pool, b, padding=10))
    assert store.nbytes == 6 * PAGE_BYTES + 30
    assert store.lookup([*a[:256], 1]).length == 256  # so the longer one is the oldest
    c = ids_of(15, 640)
    store.put(c, FakeState(pool, c, padding=10))
    assert store.nbytes == 9 * PAGE_BYTES + 30
    assert [store.lookup([*x, 1]).length for x in (a, b, c)] == [256, 256, 640]


def test_what_is_larger_than_the_budget_is_not_kept_and_drops_nobody() -> None:
    pool = make_pool()
    store, small, large = make_store(pool, 4 * PAGE_BYTES), ids_of(16, 256), ids_of(17, 1024)
    store.put(small, FakeState(pool, small))
    store.put(large, FakeState(pool, large))
    assert store.lookup([*large, 1]).reason == "evicted"
    assert store.lookup([*small, 1]).length == 256


def test_the_same_snapshot_twice_is_held_once() -> None:
    pool = make_pool()
    store, tokens = make_store(pool), ids_of(18, 200)
    store.put(tokens, FakeState(pool, tokens))
    store.put(tokens, FakeState(pool, tokens), kind="output")
    assert len(store.states()) == 1 and pool.live == 2


def test_shrinking_frees_pages_that_no_request_holds() -> None:
    pool = make_pool()
    store, a, b, c = make_store(pool), ids_of(19, 512), ids_of(20, 512), ids_of(21, 512)
    running = FakeState(pool, a)
    for tokens, state in ((a, running.clone()), (b, FakeState(pool, b)), (c, FakeState(pool, c))):
        store.put(tokens, state)
    assert pool.live == 12
    del state
    assert store.shrink(3) == 4  # the first frees nothing, as the request shares its pages; the second frees four
    assert [store.lookup([*x, 1]).length for x in (a, b, c)] == [0, 0, 512]
    assert store.shrink(100) == 4 and pool.live == 4 and store.nbytes == 0
    running.check()


def test_what_is_remembered_of_dropped_snapshots_and_seen_blocks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_GHOSTS", 5)
    monkeypatch.setattr(prefix, "_SEEN", 7)
    pool = make_pool()
    store = make_store(pool, 2 * PAGE_BYTES)
    for seed in range(30):
        tokens = ids_of(seed, 256)
        store.put(tokens, FakeState(pool, tokens))
    assert len(store._ghosts) == 5 and len(store._seen) == 7 and sum(map(len, store._index.values())) == 6
    assert store.lookup([*ids_of(28, 256), 1]).reason == "evicted"
    assert store.lookup([*ids_of(3, 256), 1]).reason == "no_common_prefix"
    long = ids_of(31, 128 * 20)
    store.observe(long)
    assert store.lookup(long).shared == 128 * 7  # the first blocks stay


def test_a_hit_on_disk_brings_the_state_back_and_shares_pages_in_memory(tmp_path: Path) -> None:
    pool = make_pool()
    system, a, b = ids_of(22, 1024), ids_of(23, 100), ids_of(24, 100)
    with_disk = make_store(pool, 1 << 30, DiskStore(tmp_path, "model", 1 << 30))
    for tail in (a, b):
        state = FakeState(pool, system)
        with_disk.put(system, state.clone(), kind="common")
        with_disk.put(system + tail, state.extend(tail))
    with_disk.close()
    state = None
    assert pool.live == 0
    store = make_store(pool, 1 << 30, DiskStore(tmp_path, "model", 1 << 30))
    assert store.lookup(ids_of(25, 300)).reason == "no_common_prefix"
    assert store.lookup([*system[:1000], 3, 3, 3]).shared == 896
    first, second = store.lookup([*system, *a, 1]), store.lookup([*system, *b, 1])
    assert (first.source, first.length, second.source, second.length) == ("disk", 1124, "disk", 1124)
    assert pool.live == 8 + 4  # eight full pages for all; the open ones of two snapshots and two clones
    assert store.lookup([*system, *a, 1]).source == "memory"
    first = second = None
    store.close()
    assert pool.live == 0


def test_pages_behind_the_common_prefix_are_not_taken_for_those_of_other_tokens(tmp_path: Path) -> None:
    pool = make_pool()
    store, a = make_store(pool, 2 * PAGE_BYTES, DiskStore(tmp_path, "model", 1 << 30)), ids_of(27, 256)
    b = a[:250] + ids_of(28, 50)
    store.put(a, FakeState(pool, a))
    store.flush()
    store.clear()
    assert store.lookup([*b, 1]).length == 250  # a's second page, which is full, is in memory now
    store.put(b, FakeState(pool, b))  # too large for memory
    store.flush()
    found = store.lookup([*b, 1])
    assert (found.source, found.state.ids) == ("disk", b)
    found.state.check()


def test_a_store_without_memory_serves_from_disk(tmp_path: Path) -> None:
    pool = make_pool()
    store, tokens = make_store(pool, 0, DiskStore(tmp_path, "model", 1 << 30)), ids_of(26, 300)
    store.put(tokens, FakeState(pool, tokens))
    store.flush()
    assert pool.live == 0
    assert store.lookup([*tokens, 1]).source == "disk"
    assert store.stats()["hit_disk"] == 1 and store.stats()["tokens_reused"] == 300


class Blank(FakeState):
    """Long, and cheap to make, copy and rewind."""

    def __init__(self, pool: PagePool, ids: list[int]) -> None:
        super().__init__(pool, [])
        self.ids, self.pages = ids, [pool.take() for _ in range(len(ids) // 128)]

    def clone(self) -> FakeState:
        return Blank(self.pool, self.ids[:8])

    def rewind(self, tokens: int) -> None:
        pass


def test_a_million_tokens_take_well_under_a_tenth_of_a_second() -> None:
    pool, tokens = make_pool(), list(range(1 << 20))
    store = make_store(pool)
    store.put(tokens, Blank(pool, tokens))
    assert store.lookup(tokens).length == (1 << 20) - 1

    def put(n: int) -> float:
        state = Blank(pool, tokens[: -128 * n])
        return seconds(lambda: store.put(tokens[: -128 * n], state))

    assert min(seconds(lambda: store.lookup(tokens)) for _ in range(3)) < 0.1
    assert min(seconds(lambda: store.observe(tokens)) for _ in range(3)) < 0.1
    assert min(put(n) for n in (1, 2, 3)) < 0.2


def seconds(call: Callable[[], object]) -> float:
    """Processor time, as others use the machine."""
    begin = time.process_time()
    call()
    return time.process_time() - begin
