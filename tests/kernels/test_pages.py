"""The page pool: pages are zeroed and apart, counted while they live, and given up when nobody holds them."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hadal.kernels.pages import Page, PagePool


def test_a_page_is_zero_even_where_another_lay() -> None:
    pool = PagePool(100)
    page = pool.take()
    page.bytes.fill_(7)
    place = page.address
    del page
    again = pool.take()
    assert again.address == place and not again.bytes.any() and again.bytes.numel() == 100


def test_a_copy_is_apart_from_its_original() -> None:
    pool = PagePool(64)
    page = pool.take()
    page.bytes.fill_(3)
    twin = pool.copy(page)
    page.bytes.fill_(4)
    assert bool((twin.bytes == 3).all()) and pool.live == 2


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 100, 4096, 300_000, 2_000_000]))
def test_live_pages_never_overlap_and_are_counted(seed: int, page_bytes: int) -> None:
    rng, pool, held = random.Random(seed), PagePool(page_bytes), list[Page]()
    for _ in range(60):
        if held and rng.random() < 0.45:
            held.pop(rng.randrange(len(held)))
        else:
            held.append(pool.take())
            assert held[-1].address % 64 == 0
        assert pool.live == len(held)
        places = sorted(page.address for page in held)
        assert all(b - a >= page_bytes for a, b in pairwise(places))


def test_memory_comes_back_when_pages_are_dropped() -> None:
    pool = PagePool(1 << 16)
    held = [pool.take() for _ in range(100)]
    assert pool.held_bytes >= 100 << 16
    del held
    assert pool.live == 0 and pool.held_bytes <= 1 << 21
