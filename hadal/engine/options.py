"""EngineOptions: what whoever runs an engine may choose, with defaults that suit a machine of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hadal.engine.request import RequestError

MiB = 1 << 20


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine; RequestError for a value that makes no sense.

    A step computes at most `token_budget` tokens, so a long prompt holds the others up for one chunk at a time.
    `cache_memory` is in bytes, for the states of sequences, running and kept (None: half of what is free);
    `prefix_disk` too, for snapshots in `prefix_folder`. Without a folder they are kept in memory alone, with
    `prefix_cache` False not at all. Of a long prompt one is taken every `snapshot_every` tokens. `speculation` is the
    most tokens to guess ahead (None: as many as the model's draft head can, 0: none).
    """

    max_concurrent: int = 16
    max_waiting: int | None = None
    token_budget: int = 512
    max_context: int | None = None
    cache_memory: int | None = None
    prefix_cache: bool = True
    prefix_folder: Path | None = None
    prefix_disk: int = 16 << 30
    snapshot_every: int = 8192
    speculation: int | None = None

    def __post_init__(self) -> None:
        self._least("max_concurrent", 1, "at least one request must run")
        self._least("max_waiting", 1, "at least one request must be able to wait")
        self._least("token_budget", 1, "a step computes at least one token")
        self._least("max_context", 2, "a prompt and its answer take at least two tokens")
        self._least("cache_memory", MiB, "give bytes, at least a mebibyte")
        self._least("prefix_disk", MiB, "give bytes, at least a mebibyte")
        self._least("snapshot_every", 128, "snapshots closer than a page are not kept")
        self._least("speculation", 0, "0 switches guessing off")

    def stops(self, begin: int, shared: int, end: int) -> tuple[int, ...]:
        """Positions behind `begin` at which a prompt that ends at `end` is kept; `shared` others had, too."""
        every = self.snapshot_every
        stops = set(range((begin // every + 1) * every, end, every))
        return tuple(sorted(stops | ({shared} if shared > begin else set())))

    def _least(self, name: str, least: int, why: str) -> None:
        value: Any = getattr(self, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise RequestError(f"`{name}` is {value!r}; {why}", name)


def engine_options(given: Mapping[str, Any]) -> EngineOptions:
    """EngineOptions of named values; RequestError for a name that is none."""
    known = [f.name for f in fields(EngineOptions)]
    for name in given:
        if name not in known:
            raise RequestError(f"unknown option {name!r}; there are {', '.join(known)}", name)
    return EngineOptions(**given)
