"""The bridge between many connections and one engine: a thread that steps it, and a queue per answer.

All methods but the thread's own loop belong to the event loop's thread; the engine belongs to the service's thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from types import TracebackType

from hadal.engine import EngineBusy
from hadal.llm import LLM, Delta, Generation

_log = logging.getLogger("hadal.server")


class Ticket:
    """One answer under way: deltas arrive in order, the last one with a finish reason."""

    def __init__(self, service: Service, generation: Generation) -> None:
        self.generation = generation
        self._service = service
        service.opened += 1
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._over = False

    async def next(self, timeout: float) -> Delta | None:
        """The next delta, or None when none came within `timeout` seconds."""
        try:
            delta = await asyncio.wait_for(self._deltas.get(), timeout)
        except TimeoutError:
            return None
        self._over = delta.finish_reason is not None
        return delta

    def put(self, delta: Delta) -> None:
        """Hand over a delta from the service's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._service.opened -= 1
        if not self._over:  # the client is gone or the handler failed: the engine must not work on
            self._service.abort(self)


class Service:
    """Runs one LLM for any number of connections."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.opened = 0  # tickets that nobody has left yet
        self._live: dict[Generation, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="hadal-engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; answers under way end with finish reason "abort"."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def active(self) -> int:
        """Answers under way."""
        return len(self._live)

    @property
    def full(self) -> bool:
        """Whether as many answers are under way as may run and wait."""
        limits = self.llm.engine.options
        return limits.max_waiting is not None and self.opened >= limits.max_waiting + limits.max_concurrent

    def open(self, generation: Generation) -> Ticket:
        """Queue a prepared generation; use the ticket in a `with` block, which aborts an answer left early."""
        ticket = Ticket(self, generation)
        self._inbox.put(lambda: self._submit(ticket))
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Have the engine drop an answer."""
        self._inbox.put(lambda: self._drop(ticket))

    def _submit(self, ticket: Ticket) -> None:
        try:
            self.llm.submit(ticket.generation)
        except EngineBusy as error:
            return ticket.put(Delta(finish_reason="error", error=str(error)))
        self._live[ticket.generation] = ticket

    def _drop(self, ticket: Ticket) -> None:
        self._live.pop(ticket.generation, None)
        self.llm.abort(ticket.generation)

    def _run(self) -> None:
        while self._obey():
            try:
                advanced = self.llm.step()
            except Exception:
                # A failed step does not tell which request caused it: all that ran are ended, those that wait go on.
                _log.exception("a step of the engine failed; the requests that ran are ended")
                ran = [g for g in self._live if g.request.finished]
                failed = Delta(finish_reason="error", error="the engine failed on this request; see the server's log")
                self._end(ran or list(self._live), failed)
                continue
            for generation, delta in advanced:
                self._live[generation].put(delta)
                if delta.finish_reason is not None:
                    del self._live[generation]
        self._end(list(self._live), Delta(finish_reason="abort"))
        self.llm.close()

    def _obey(self) -> bool:
        """Carry out what has come in, waiting for something when there is nothing to compute; False to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self.llm.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            try:
                command()
            except Exception:  # whatever one request did, the others are served on
                _log.exception("a request could not be queued or ended")

    def _end(self, generations: list[Generation], delta: Delta) -> None:
        for generation in generations:
            ticket = self._live[generation]
            self._drop(ticket)
            ticket.put(delta)
