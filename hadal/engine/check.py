"""The integrity check: every live page is referred to, no state lacks or shares what it writes, no request is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hadal.engine.request import Request
from hadal.kernels.pages import PAGE_TOKENS, PagePool


def find_faults(
    pool: PagePool, running: Sequence[Request], waiting: Iterable[Request], kept: Sequence[Any]
) -> list[str]:
    """Sentences on what is wrong, none if all is well; `kept` are the states of the prefix store."""
    faults = []
    queued = list(waiting)
    snapshots = list({id(state): state for state in kept}.values())  # one may be kept and wait to be written as well
    states = [r.state for r in running] + snapshots
    if any(state is None for state in states):
        return ["a running request or a snapshot has no state"]
    if any(r.state is not None for r in queued):
        faults.append("a waiting request holds a state")
    if len({*running, *queued}) != len(running) + len(queued):
        faults.append("a request is queued twice")
    faults += [f"request {r.id} is queued and has ended" for r in (*running, *queued) if r.finished]
    pages = {id(page) for state in states for page in state.pages}
    if len(pages) != pool.live:
        faults.append(f"{pool.live} pages are alive and {len(pages)} of them belong to a request or a snapshot")
    for state in states:
        if len(state.pages) != -(-state.position // PAGE_TOKENS):
            faults.append(f"a state at position {state.position} has {len(state.pages)} pages")
    # A page that is not full is still written to.
    full = [state.position // PAGE_TOKENS for state in states]
    written = Counter(id(p) for state, n in zip(states, full, strict=True) for p in state.pages[n:])
    read = {id(page) for state, n in zip(states, full, strict=True) for page in state.pages[:n]}
    if any(count > 1 for count in written.values()) or read & written.keys():
        faults.append("a page that is still written to belongs to two states")
    if len({id(state) for state in states}) != len(states):
        faults.append("two owners hold one state")
    return faults
