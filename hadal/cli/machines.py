"""Where the answers of `hadal serve` come from when it is not a model in its own process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadal.server.backend import Backend
    from hadal.server.fleet import Fleet


def open_upstream(model: str, url: str, name: str | None, key: str | None, max_waiting: int) -> Backend:
    """A server at a URL that knows its model as `name`; `model` is where its tokenizer is."""
    from hadal.server.remote import RemoteBackend
    from hadal.server.upstream import Upstream

    return RemoteBackend(Upstream(url, model=name, key=key), model, max_waiting=max_waiting)


def fleet_opener(
    model: str, options: Mapping[str, Any], replicas: int, threads: int | None, max_waiting: int
) -> Callable[[], Backend]:
    """What starts replicas under Ray Serve, by default with an equal share of this machine's threads each.

    To be called in the main thread: SIGHUP is going to replace all replicas.
    """
    from hadal.server.remote import RemoteBackend
    from hadal.server.run import ServeError

    try:
        from hadal.server.fleet import Fleet, LoadReplica, connect
    except ModuleNotFoundError:
        raise ServeError("Ray Serve is not installed; install it with `pip install hadal[ray]`") from None

    threads = threads or max((os.cpu_count() or 1) // replicas, 1)
    connect(replicas * threads)
    fleets: list[Fleet] = []

    def roll(*_: object) -> None:
        for fleet in fleets:
            threading.Thread(target=fleet.roll, daemon=True).start()

    def start() -> Backend:
        make = LoadReplica(model, options, replicas)
        fleets.append(Fleet(make, replicas=replicas, threads=threads, max_concurrent=options["max_concurrent"]))
        return RemoteBackend(fleets[0], model, max_waiting=max_waiting)

    signal.signal(signal.SIGHUP, roll)
    return start
