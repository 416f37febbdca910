"""Routing: which of several engines answers a prompt, by the prefixes each has seen and by how busy it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import count

import numpy as np

_FIRST = 32  # tokens up to the first mark; nothing shorter is kept by an engine
_STEP = 8  # marks lie an eighth of their position apart

Mark = tuple[int, bytes]  # a number of tokens, and a digest of that many from the start


def marks(tokens: Sequence[int], tenant: str = "") -> list[Mark]:
    """Digests of growing prefixes: the same for prompts of a tenant that begin alike, however they go on."""
    data, digest = np.asarray(tokens, np.uint32).tobytes(), blake2b(tenant.encode(), digest_size=16)
    out: list[Mark] = []
    begin, end = 0, _FIRST
    while end <= len(tokens):
        digest.update(data[4 * begin : 4 * end])
        out.append((end, digest.digest()))
        begin, end = end, end + max(_FIRST, end // _STEP)
    return out


class Routes:
    """Who has seen which prefix, for the `most` marks that were used last."""

    def __init__(self, *, slack: int = 8, most: int = 1 << 17) -> None:
        self._slack, self._most = slack, most
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()
        self._last: dict[str, int] = {}  # the turn in which an engine was chosen last
        self._turns = count(1)

    def rank(self, prefix: Sequence[Mark], length: int, loads: Mapping[str, int]) -> list[str]:
        """The engines of `loads`, which has the requests under way at each, the best for a prompt of `length` first.

        That is who has seen the longest prefix, if it is half of the prompt at least and no more than `slack` requests
        more than at the idlest are under way there; else the idlest, and of several the one not chosen for longest.
        """
        known = self._known(prefix, loads)
        limit = min(loads.values(), default=0) + self._slack

        def order(name: str) -> tuple[bool, int, int, int]:
            seen = known.get(name, 0)
            return loads[name] > limit, -seen if 2 * seen >= length else 0, loads[name], self._last.get(name, 0)

        return sorted(loads, key=order)

    def note(self, prefix: Sequence[Mark], name: str) -> None:
        """Remember that the engine `name` got a prompt."""
        self._last[name] = next(self._turns)
        for _, digest in reversed(prefix):  # the beginnings, without which nothing is found, are dropped last
            self._seen.setdefault(digest, set()).add(name)
            self._seen.move_to_end(digest)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def forget(self, gone: set[str]) -> None:
        """Drop engines that are no more."""
        for name in gone:
            self._last.pop(name, None)
        for digest in [digest for digest, names in self._seen.items() if names & gone]:
            self._seen[digest] -= gone
            if not self._seen[digest]:
                del self._seen[digest]

    def _known(self, prefix: Sequence[Mark], loads: Mapping[str, int]) -> dict[str, int]:
        """How many tokens of the prefix each engine has seen."""
        known: dict[str, int] = {}
        for tokens, digest in prefix:
            if digest not in self._seen:
                break
            known |= dict.fromkeys(self._seen[digest] & loads.keys(), tokens)
        return known
