"""A sequence state that is nothing but its tokens: every byte of its pages and home can be foretold, and is checked."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch

from hadal.kernels.pages import PAGE_TOKENS, REWIND, Page, PagePool

PAGE_BYTES = 64


def make_pool() -> PagePool:
    return PagePool(PAGE_BYTES)


def page_content(ids: list[int], number: int) -> bytes:
    """What page `number` of a sequence holds; all tokens before its end count."""
    return blake2b(repr(ids[: (number + 1) * PAGE_TOKENS]).encode(), digest_size=PAGE_BYTES).digest()


class FakeState:
    """The state protocol of the engine over a list of ids; `padding` more bytes make its home larger."""

    def __init__(self, pool: PagePool, ids: list[int], padding: int = 0) -> None:
        self.pool, self.ids, self.padding = pool, list(ids), padding
        self.pages: list[Page] = [self._page(i) for i in range(-(-len(ids) // PAGE_TOKENS))]

    @property
    def position(self) -> int:
        return len(self.ids)

    @property
    def rewindable(self) -> int:
        return min(REWIND, len(self.ids))

    def clone(self) -> FakeState:
        twin = FakeState(self.pool, [], self.padding)
        twin.ids, twin.pages = list(self.ids), list(self.pages)
        if len(self.ids) % PAGE_TOKENS:
            twin.pages[-1] = self._page(len(self.pages) - 1)
        return twin

    def extend(self, ids: list[int]) -> FakeState:
        """Continue in place; full pages stay the same objects."""
        del self.pages[len(self.ids) // PAGE_TOKENS :]
        self.ids += ids
        self.pages += [self._page(i) for i in range(len(self.pages), -(-len(self.ids) // PAGE_TOKENS))]
        return self

    def rewind(self, tokens: int) -> None:
        assert 0 <= tokens <= self.rewindable
        del self.ids[len(self.ids) - tokens :]
        del self.pages[len(self.ids) // PAGE_TOKENS :]
        if len(self.ids) % PAGE_TOKENS:
            self.pages.append(self._page(len(self.pages)))

    def dump(self) -> bytes:
        return np.array([self.padding, *self.ids]).tobytes() + bytes(self.padding)

    def nbytes(self) -> int:
        return self.padding + len(self.pages) * self.pool.page_bytes

    def check(self) -> None:
        """Every page holds what these ids give."""
        assert len(self.pages) == -(-len(self.ids) // PAGE_TOKENS)
        for i, page in enumerate(self.pages):
            assert bytes(page.bytes.numpy()) == page_content(self.ids, i)

    def _page(self, number: int) -> Page:
        page = self.pool.take()
        page.bytes.copy_(torch.frombuffer(bytearray(page_content(self.ids, number)), dtype=torch.uint8))
        return page


def restorer(pool: PagePool):
    """What the store calls to make a state of bytes and pages; wrong pages fail here."""

    def restore(home: bytes, pages: list[Page]) -> FakeState:
        padding = int(np.frombuffer(home[:8], np.int64)[0])
        ids = np.frombuffer(home[8 : len(home) - padding], np.int64).tolist()
        state = FakeState(pool, [], padding)
        state.ids, state.pages = ids, list(pages)
        state.check()
        return state

    return restore
