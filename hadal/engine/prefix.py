"""The prefix store: states behind prompts and answers, so that tokens seen before need not be computed again.

It sits beside the engine, whose thread calls it. Tokens are known by a chain of digests over blocks of 128 that begins
with the tenant, so nobody can hit, or learn of, what another tenant stored.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, get_args

import numpy as np
import torch

from hadal.engine.disk import DiskStore, File, Snapshot
from hadal.kernels.pages import PAGE_TOKENS, REWIND, Page, PagePool

Reason = Literal["hit", "short", "empty", "no_common_prefix", "no_snapshot", "evicted", "corrupt"]

_KINDS = ("turn", "output", "common", "interval", "preempted")
_ALL = 1 << 30
_SEEN = 1 << 17  # blocks remembered without their state
_GHOSTS = 1 << 12  # snapshots remembered after their state has gone


@dataclass(frozen=True, slots=True)
class Found:
    """What a look-up gives: a state after the first `length` tokens, the caller's own, or None and the reason.

    "short": one token or none; "empty": nothing is stored for this tenant; "no_common_prefix": not one block of it was
    seen; "no_snapshot": blocks were seen, but no snapshot lies within; "evicted": there was one; "corrupt": there was
    one on disk, and it was damaged. `shared` is the longest prefix in whole blocks that was seen before.
    """

    state: Any = None
    length: int = 0
    source: Literal["memory", "disk", ""] = ""
    reason: Reason = "hit"
    shared: int = 0


@dataclass(eq=False, slots=True)
class _Entry:
    snapshot: Snapshot
    state: Any  # None once it is dropped


class PrefixStore:
    """Snapshots within `memory_bytes`, the least recently used go first; with a `disk` they are written there as well.

    A page counts once however many snapshots share it. States have their pages from `pool`, and `restore` makes one of
    the bytes of its `dump` and its pages.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        pool: PagePool,
        restore: Callable[[bytes, list[Page]], Any],
        disk: DiskStore | None = None,
    ) -> None:
        self._memory_bytes, self._pool, self._restore, self._disk = memory_bytes, pool, restore, disk
        self._index: dict[str, dict[str, _Entry]] = {}  # by key and tail
        self._live: OrderedDict[_Entry, None] = OrderedDict()
        self._ghosts: OrderedDict[_Entry, None] = OrderedDict()
        self._seen: dict[str, None] = {}
        self._holders: dict[Page, tuple[int, str]] = {}  # how many snapshots hold a page, and its block if it is full
        self._by_block: dict[str, Page] = {}
        self.home_bytes = 0
        names = ["lookups", "tokens_looked_up", "tokens_reused", "hit_memory", "hit_disk", "evicted"]
        names += [f"miss_{reason}" for reason in get_args(Reason)[1:]] + [f"stored_{kind}" for kind in _KINDS]
        self._counters = Counter(dict.fromkeys(names, 0))

    def lookup(self, tokens: Sequence[int], tenant: str = "", limit: int | None = None) -> Found:
        """The longest prefix of `tokens` up to `limit` that can be continued; by default all but the last token."""
        ids_T = _as_ids(tokens)
        limit = len(ids_T) - 1 if limit is None else min(limit, len(ids_T))
        found = self._find(ids_T, self._chain(ids_T[: max(limit, 0)], tenant), limit)
        self._counters.update({"lookups": 1, "tokens_looked_up": len(ids_T), "tokens_reused": found.length})
        self._counters[f"hit_{found.source}" if found.source else f"miss_{found.reason}"] += 1
        return found

    def observe(self, tokens: Sequence[int], tenant: str = "") -> None:
        """Remember a prompt's blocks, by which a later `lookup` knows what it shares."""
        self._remember(self._chain(_as_ids(tokens), tenant))

    def put(self, tokens: Sequence[int], state: Any, tenant: str = "", kind: str = "turn") -> None:
        """Keep a state, which the caller gives away, that has seen exactly `tokens`; `kind` says what ends there."""
        ids_T = _as_ids(tokens)
        assert state.position == len(ids_T) > 0 and len(state.pages) == -(-len(ids_T) // PAGE_TOKENS)
        assert kind in _KINDS
        chain = self._chain(ids_T, tenant)
        blocks = max(len(ids_T) - REWIND, 0) // PAGE_TOKENS  # that whoever can use the state has as well
        start = blocks * PAGE_TOKENS
        tail = ids_T[start:].tobytes().hex()
        snapshot = Snapshot(chain[0], chain[blocks], start, tail, state.rewindable, kind)
        self._counters[f"stored_{kind}"] += 1
        self._remember(chain)
        self._keep(snapshot, chain[1:], state)
        if self._disk is not None:
            self._disk.submit(snapshot, chain, state)

    def shrink(self, pages: int) -> int:
        """Drop what was least recently used until `pages` pages are free, or all; the number that became free."""
        before = self._pool.live
        if self._disk is not None:
            self._disk.release(_ALL)
        while self._live and before - self._pool.live < pages:
            self._drop(next(iter(self._live)))
        if before - self._pool.live < pages:
            self.clear()
        return before - self._pool.live

    def states(self) -> list[Any]:
        """Every state it refers to, those that wait for the disk included; one may be there twice."""
        return [entry.state for entry in self._live] + ([] if self._disk is None else self._disk.states())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the snapshots hold, shared pages once."""
        return len(self._holders) * self._pool.page_bytes + self.home_bytes

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now."""
        held = {"bytes_memory": self.nbytes, "snapshots_memory": len(self._live)}
        if self._disk is not None:
            held |= {"bytes_disk": self._disk.nbytes, "files_disk": len(self._disk.files)}
            held |= {f"disk_{name}": count for name, count in self._disk.counters.items()}
        return dict(self._counters) | held

    def flush(self) -> None:
        """Wait until all is on disk."""
        if self._disk is not None:
            self._disk.flush()

    def clear(self) -> None:
        """Let go of every state, those that wait for the disk included."""
        while self._live:
            self._drop(next(iter(self._live)))
        if self._disk is not None:
            self._disk.release(0)

    def close(self) -> None:
        """Finish writing, give up the folder and let go of every state."""
        if self._disk is not None:
            self._disk.close()
        self.clear()

    def _chain(self, ids_T: np.ndarray, tenant: str) -> list[str]:
        """The tenant's root, then a digest of all tokens up to the end of each full block."""
        model_key = self._disk.model_key if self._disk is not None else ""
        chain = [blake2b(repr((model_key, tenant)).encode(), digest_size=16).hexdigest()]
        content = ids_T.tobytes()
        for end in range(4 * PAGE_TOKENS, len(content) + 1, 4 * PAGE_TOKENS):
            block = content[end - 4 * PAGE_TOKENS : end]
            chain.append(blake2b(chain[-1].encode() + block, digest_size=16).hexdigest())
        return chain

    def _remember(self, chain: list[str]) -> None:
        for block in reversed(chain[1:]):  # the first blocks, which others are likelier to share, are forgotten last
            self._seen.pop(block, None)
            self._seen[block] = None
        while len(self._seen) > _SEEN:
            del self._seen[next(iter(self._seen))]

    def _find(self, ids_T: np.ndarray, chain: list[str], limit: int) -> Found:
        if limit < 1:
            return Found(reason="short")
        on_disk = {} if self._disk is None else self._disk.by_block
        known = (i for i in range(len(chain) - 1, 0, -1) if chain[i] in self._seen or chain[i] in on_disk)
        shared = next(known, 0) * PAGE_TOKENS
        reason: Reason = "no_snapshot" if shared else "no_common_prefix"
        if not shared and not self._has_tenant(chain[0]):
            reason = "empty"
        while True:
            best, length, dropped = self._best(ids_T, chain, limit)
            if best is None:
                return Found(reason="evicted" if dropped and reason != "corrupt" else reason, shared=shared)
            with torch.inference_mode():
                state = self._use(best) if isinstance(best, _Entry) else self._load(best, chain)
                if state is None:
                    reason = "corrupt"
                    continue
                state = state.clone()
                state.rewind(state.position - length)
            return Found(state, length, "memory" if isinstance(best, _Entry) else "disk", "hit", shared)

    def _best(self, ids_T: np.ndarray, chain: list[str], limit: int) -> tuple[_Entry | File | None, int, bool]:
        """The snapshot that serves most, memory before disk, how many tokens, and whether a dropped one could have."""
        best: _Entry | File | None = None
        length, dropped = 0, False
        for blocks in reversed(range(len(chain))):
            if length >= blocks * PAGE_TOKENS + PAGE_TOKENS + REWIND - 1:
                break  # nobody with fewer blocks in the key has more tokens
            entries = self._index.get(chain[blocks], {}).values()
            files = () if self._disk is None else self._disk.by_key.get(chain[blocks], ())
            candidates: list[_Entry | File] = [*entries, *files]
            for candidate in candidates:
                usable = candidate.snapshot.usable(ids_T, limit) if candidate.snapshot is not None else 0
                if isinstance(candidate, _Entry) and candidate.state is None:
                    dropped |= usable > 0
                elif usable > length:
                    best, length = candidate, usable
        return best, length, dropped

    def _use(self, entry: _Entry) -> Any:
        self._live.move_to_end(entry)
        if self._disk is not None:
            self._disk.touch(entry.snapshot)
        return entry.state

    def _load(self, file: File, chain: list[str]) -> Any:
        assert self._disk is not None and file.snapshot is not None
        loaded = self._disk.load(file, self._by_block, self._pool.take)
        if loaded is None:
            return None
        state = self._restore(*loaded)
        # Behind the keyed blocks the tokens of `chain` may be others than the snapshot's.
        self._keep(file.snapshot, chain[1 : 1 + file.snapshot.start // PAGE_TOKENS], state)
        return state

    def _keep(self, snapshot: Snapshot, blocks: list[str], state: Any) -> None:
        entry = self._index.setdefault(snapshot.key, {}).setdefault(snapshot.tail, _Entry(snapshot, None))
        if entry.state is not None:
            return self._live.move_to_end(entry)
        entry.snapshot = snapshot  # this state may step back less far than the one that was there before
        self._ghosts.pop(entry, None)
        if state.nbytes() > self._memory_bytes:
            return self._bury(entry)
        entry.state = state
        self._live[entry] = None
        self.home_bytes += _home_bytes(state, self._pool)
        for i, page in enumerate(state.pages):
            count, block = self._holders.get(page, (0, blocks[i] if i < len(blocks) else ""))
            self._holders[page] = (count + 1, block)
            if block:
                self._by_block.setdefault(block, page)
        while self.nbytes > self._memory_bytes:
            self._drop(next(iter(self._live)))

    def _drop(self, entry: _Entry) -> None:
        del self._live[entry]
        state, entry.state = entry.state, None
        self.home_bytes -= _home_bytes(state, self._pool)
        for page in state.pages:
            count, block = self._holders.pop(page)
            if count > 1:
                self._holders[page] = (count - 1, block)
            elif self._by_block.get(block) is page:
                del self._by_block[block]
        self._counters["evicted"] += 1
        self._bury(entry)

    def _bury(self, entry: _Entry) -> None:
        """Remember that there was such a snapshot."""
        self._ghosts[entry] = None
        if len(self._ghosts) > _GHOSTS:
            snapshot = self._ghosts.popitem(last=False)[0].snapshot
            del self._index[snapshot.key][snapshot.tail]
            if not self._index[snapshot.key]:
                del self._index[snapshot.key]

    def _has_tenant(self, root: str) -> bool:
        files = [] if self._disk is None else list(self._disk.files.values())
        snapshots = [entry.snapshot for entry in self._live] + [file.snapshot for file in files if file.snapshot]
        return any(snapshot.root == root for snapshot in snapshots)


def _as_ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, "<i4")


def _home_bytes(state: Any, pool: PagePool) -> int:
    return int(state.nbytes() - len(state.pages) * pool.page_bytes)
