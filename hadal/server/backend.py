"""Where answers come from: the Backend protocol, and LocalBackend, a thread that steps one LLM for all connections.

All methods but `prepare` and the thread's own loop belong to the event loop's thread; the engine belongs to the
backend's thread. What a step adds to all answers crosses over in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hadal.engine import EngineBusy, RequestError
from hadal.llm import LLM, Delta, Generation
from hadal.server.ask import Ask
from hadal.server.errors import APIError
from hadal.text import Tokenizer

BACKGROUND = -100  # the priority of what gives way to everybody who waits for an answer
_log = logging.getLogger("hadal.server")


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a backend is; `wait` is in seconds, what a new request may expect before it begins."""

    running: int
    waiting: int
    wait: float
    full: bool


class Backend(Protocol):
    """A model that answers. `prepare` may be called from any thread and changes nothing."""

    name: str
    tokenizer: Tokenizer
    max_context: int

    @property
    def efforts(self) -> tuple[str, ...]:
        """The reasoning efforts that the model's prompt rules know."""

    @property
    def load(self) -> Load:
        """How busy it is now."""

    def prepare(self, ask: Ask, tenant: str) -> list[Generation]:
        """The answers-to-be, samples of a prompt side by side; a ValueError says what cannot be served."""

    def open(self, generations: Sequence[Generation]) -> Ticket:
        """Queue prepared answers. Raises EngineBusy when the queue is full."""

    def start(self) -> None:
        """Begin to work for the running event loop."""

    def close(self) -> None:
        """Stop; answers under way end with finish reason "abort"."""


class Ticket:
    """Answers under way together. Deltas of an answer arrive in order, its last one has a finish reason."""

    def __init__(self, generations: Sequence[Generation], abort: Callable[[Ticket], None]) -> None:
        self.generations = generations
        self.open = len(generations)  # answers whose last delta has not been taken
        self.failure: APIError | None = None  # what a last delta with finish reason "error" stands for
        self._abort = abort
        self._parts: list[tuple[int, Delta]] = []
        self._arrived = asyncio.Event()
        self._closed = False

    def put(self, index: int, delta: Delta) -> None:
        """Add a delta, in the event loop's thread; what nobody has taken yet grows together."""
        if self._parts and self._parts[-1][0] == index and (joined := join(self._parts[-1][1], delta)):
            self._parts[-1] = (index, joined)
        else:
            self._parts.append((index, delta))
        self._arrived.set()

    async def take(self, timeout: float) -> list[tuple[int, Delta]]:
        """What has come since the last call, with the index of each answer; empty after `timeout` seconds."""
        if not self._parts:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout):  # wait_for may lose a cancellation when both come together
                    await self._arrived.wait()
            except TimeoutError:
                return []
        parts, self._parts = self._parts, []
        self.open -= sum(delta.finish_reason is not None for _, delta in parts)
        return parts

    def close(self) -> None:
        """Leave; the backend drops what has not ended, for nobody will read it."""
        if not self._closed:
            self._closed = True
            self._abort(self)


def join(a: Delta, b: Delta) -> Delta | None:
    """Both deltas as one, or None where their order would be lost: reasoning comes before text before tool calls."""
    out_of_order = (a.tool_calls and (b.text or b.reasoning)) or (a.text and b.reasoning)
    if out_of_order or (b.reasons and a.reasons < len(a.token_ids)):
        return None
    return replace(
        b,
        text=a.text + b.text,
        reasoning=a.reasoning + b.reasoning,
        tool_calls=a.tool_calls + b.tool_calls,
        token_ids=a.token_ids + b.token_ids,
        logprobs=a.logprobs + b.logprobs,
        reasons=a.reasons + b.reasons,
    )


def failure(told: str | None, stuck: bool) -> APIError:
    """What a delta with finish reason "error" stands for; `stuck` is of its Request."""
    if stuck:
        return APIError(400, told or "", code="grammar_failed")
    return APIError(500, told or "the engine failed on this request", code="engine_error")


def prepare(llm: LLM, ask: Ask, tenant: str) -> list[Generation]:
    """The answers-to-be of `llm` to what is asked; a ValueError of the room concerned says what cannot be served."""
    options: dict[str, Any] = {"tenant": tenant, "priority": ask.priority}
    params = llm.default_params(**ask.sampling)
    if ask.messages is not None:
        effort = ask.effort if ask.effort in llm.efforts else "high"  # rules without "low" start at "high"
        return llm.prepare_chat(
            list(ask.messages), params, thinking=ask.thinking, reasoning_effort=effort,
            tools=ask.tools or None, tool_choice=ask.tool_choice, parallel_tool_calls=ask.parallel_tool_calls,
            **options,
        )  # fmt: skip
    if ask.suffix is not None:
        return [g for p in ask.prompts for g in llm.prepare_infill(str(p), ask.suffix, params, **options)]
    return [g for p in ask.prompts for g in llm.prepare_prompt(p, params, **options)]


class LocalBackend:
    """Runs one LLM for any number of connections."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.name = llm.name
        self.tokenizer = llm.tokenizer
        self.max_context = llm.engine.max_context
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._opened = 0  # answers of tickets that nobody has left yet
        self._background = 0  # those of them that give way to all others
        self._live: dict[Generation, tuple[Ticket, int]] = {}
        self._answer_seconds = 0.0  # moving average of the time from first state to end
        self._thread = threading.Thread(target=self._run, name="hadal-engine", daemon=True)

    @property
    def efforts(self) -> tuple[str, ...]:
        """The reasoning efforts that the model's prompt rules know."""
        return self.llm.efforts

    @property
    def load(self) -> Load:
        """A queue moves on when one of the running answers ends."""
        limits, engine = self.llm.engine.options, self.llm.engine
        waiting = max(self._opened - limits.max_concurrent, engine.waiting)
        ahead = max(self._opened - self._background + 1 - limits.max_concurrent, 0)
        most = limits.max_waiting
        full = most is not None and self._opened >= most + limits.max_concurrent
        return Load(engine.running, waiting, ahead * self._answer_seconds / limits.max_concurrent, full)

    def prepare(self, ask: Ask, tenant: str) -> list[Generation]:
        """The answers-to-be; a ValueError of the room concerned says what cannot be served."""
        return prepare(self.llm, ask, tenant)

    def start(self) -> None:
        """Begin stepping."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; answers under way end with finish reason "abort"."""
        self._inbox.put(None)
        self._thread.join()

    def open(self, generations: Sequence[Generation]) -> Ticket:
        """Queue prepared answers; EngineBusy when too many run and wait, RequestError if these never fit."""
        limits = self.llm.engine.options
        most = None if limits.max_waiting is None else limits.max_waiting + limits.max_concurrent
        if most is not None and len(generations) > most:
            raise RequestError(
                f"{len(generations)} answers are asked for and at most {most} run and wait here; ask for fewer", "n"
            )
        if most is not None and self._opened + len(generations) > most:
            raise EngineBusy(f"{most} answers run and wait already; try again later")
        self._opened += len(generations)
        self._background += _background(generations)
        ticket = Ticket(generations, self._leave)
        self._inbox.put(lambda: self._submit(ticket))
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        self._opened -= len(ticket.generations)
        self._background -= _background(ticket.generations)
        if ticket.open:
            self._inbox.put(lambda: self._drop(ticket))

    def _submit(self, ticket: Ticket) -> None:
        for index, generation in enumerate(ticket.generations):
            self._live[generation] = (ticket, index)
            self.llm.submit(generation)  # never too many: `open` counts them

    def _drop(self, ticket: Ticket) -> None:
        for generation in ticket.generations:
            self._live.pop(generation, None)
            self.llm.abort(generation)

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
            self._hand_over([(*self._live[generation], delta) for generation, delta in advanced])
            for generation, delta in advanced:
                if delta.finish_reason is not None:
                    del self._live[generation]
                    self._observe(generation)
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

    def _end(self, generations: Sequence[Generation], delta: Delta) -> None:
        for generation in generations:
            ticket, index = self._live.pop(generation)
            self.llm.abort(generation)
            self._hand_over([(ticket, index, delta)])

    def _hand_over(self, parts: list[tuple[Ticket, int, Delta]]) -> None:
        if parts and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, parts)

    def _observe(self, generation: Generation) -> None:
        if generation.request.admitted is not None:
            took = time.monotonic() - generation.request.admitted
            self._answer_seconds += (took - self._answer_seconds) / 8 if self._answer_seconds else took


def _background(generations: Sequence[Generation]) -> int:
    return sum(g.request.priority <= BACKGROUND for g in generations)


def _deliver(parts: list[tuple[Ticket, int, Delta]]) -> None:
    for ticket, index, delta in parts:
        ticket.put(index, delta)
