"""Pages: the part of a sequence's state that grows, in pieces of 128 source tokens that sequences share once full.

A page belongs to everyone who refers to it; when the last reference is gone its bytes go back to the pool, which keeps
them for the next page. So the pages alive are exactly those that some state holds.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

PAGE_TOKENS = 128
REWIND = 8  # tokens that a state can forget at once: rejected drafts, or those behind a shorter common prefix
SLACK = 2 * REWIND  # how far behind the furthest token it has seen a state may come to stand
_SLAB_BYTES = 1 << 20  # pages are cut from pieces of about this size
_PADDING = 4096  # kernels may read a little past the end of a page
_LINE = 64


class Page:
    """One page; `bytes` is a uint8 tensor on the pool's device, `address` where it lies."""

    __slots__ = ("_pool", "_slab", "address", "bytes")

    def __init__(self, pool: PagePool, slab: int, content: Tensor) -> None:
        self._pool, self._slab, self.bytes = pool, slab, content
        self.address = content.data_ptr()

    def __del__(self) -> None:
        # Any thread may drop the last reference; the pool belongs to one, which takes the bytes back in its own time.
        self._pool._returned.append((self._slab, self.bytes))


class PagePool:
    """Makes pages of one size, for one thread. Slabs without a live page are given up."""

    def __init__(self, page_bytes: int, device: torch.device | str = "cpu") -> None:
        self.page_bytes = page_bytes
        self._live = 0
        self._returned: deque[tuple[int, Tensor]] = deque()
        self._device = torch.device(device)
        self._stride = max(-(-page_bytes // _LINE), 1) * _LINE  # a model of windows alone has empty pages
        self._per_slab = max(_SLAB_BYTES // self._stride, 1)
        self._free: dict[int, list[Tensor]] = {}  # per slab that has a free page
        self._made = self._slabs = 0

    @property
    def live(self) -> int:
        """Pages that someone refers to."""
        self._take_back()
        return self._live

    @property
    def held_bytes(self) -> int:
        """Bytes that live and free pages occupy."""
        self._take_back()
        return self._slabs * self._per_slab * self._stride

    def take(self) -> Page:
        """A page of zeros."""
        self._take_back()
        if not self._free:
            self._free[self._made] = self._cut()
            self._made += 1
            self._slabs += 1
        slab, free = next(iter(self._free.items()))
        page = Page(self, slab, free.pop().zero_())
        self._live += 1
        if not free:
            del self._free[slab]
        return page

    def copy(self, page: Page) -> Page:
        """A page of the same content."""
        twin = self.take()
        twin.bytes.copy_(page.bytes)
        return twin

    def _cut(self) -> list[Tensor]:
        with torch.inference_mode(False):  # or nothing outside that mode could write to its pages
            slab = torch.empty(self._per_slab * self._stride + _PADDING + _LINE, dtype=torch.uint8, device=self._device)
            first = -slab.data_ptr() % _LINE
            places = range(first, first + self._per_slab * self._stride, self._stride)
            return [slab[place : place + self.page_bytes] for place in reversed(places)]

    def _take_back(self) -> None:
        while self._returned:
            slab, content = self._returned.popleft()
            self._live -= 1
            free = self._free.setdefault(slab, [])
            free.append(content)
            if len(free) == self._per_slab and len(self._free) > 1:
                del self._free[slab]
                self._slabs -= 1


class PagedState:
    """What the states of all models share: a position, the pages of the tokens before it, and how to step back."""

    pool: PagePool
    pages: list[Page]
    position: int
    peak: int  # the furthest position it has rewound from

    def extend(self, end: int) -> None:
        """Make room for the tokens before position `end`."""
        while len(self.pages) * PAGE_TOKENS < end:
            self._put(self.pool.take())

    @property
    def rewindable(self) -> int:
        """Tokens that it can forget."""
        return min(REWIND, self.position - max(self.peak - SLACK, 0))

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens`, at most `rewindable`."""
        assert 0 <= tokens <= self.rewindable
        was_full = self.position // PAGE_TOKENS
        self.peak = max(self.peak, self.position)
        self.position -= tokens
        if self.position // PAGE_TOKENS < was_full:
            self._part()  # a page that was full may have other readers
        else:
            del self.pages[-(-self.position // PAGE_TOKENS) :]

    def _part(self) -> None:
        """Own the page that is not full; others may refer to it."""
        del self.pages[-(-self.position // PAGE_TOKENS) :]
        if self.position % PAGE_TOKENS:
            self._put(self.pool.copy(self.pages.pop()))

    def _put(self, page: Page) -> None:
        self.pages.append(page)
