"""Service: what every API's endpoints stand on: admission, one way to follow answers, and a row for each of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from hadal.accounts import Accounts, AccountsError, Hold, Key, LimitReached, UsageRow
from hadal.engine import EngineBusy, RequestError
from hadal.llm import Delta, Generation
from hadal.server.ask import Ask
from hadal.server.backend import Backend, Ticket, failure
from hadal.server.errors import CLIENT_GONE, APIError
from hadal.server.gate import caller
from hadal.server.memory import TurnMemory
from hadal.server.reply import Reply
from hadal.server.settings import Settings
from hadal.server.visit import Caller, Observer, Visit
from hadal.server.wire import Context, MakeWire, Usage, Wire

_log = logging.getLogger("hadal.server")
_LEDGER_SECONDS = 30.0  # how long an answer waits for its row to be safe
_MOST_RETRY_AFTER = 300.0
_APIS = {"/chat/completions": "chat", "/completions": "completions", "/responses": "responses", "/messages": "messages"}
_WORKERS = 4
_T = TypeVar("_T")


@dataclass(eq=False)
class Seat:
    """A visit that was let in: its answers under way and what it holds until they end."""

    visit: Visit
    ask: Ask
    ticket: Ticket
    hold: Hold
    context: Context
    left: bool = False

    @property
    def scored(self) -> bool:
        """Whether log-probabilities were asked for, which make answers large."""
        return any(self.ask.sampling.get(name) is not None for name in ("logprobs", "prompt_logprobs"))


class Service:
    """One server's state. All methods belong to the event loop's thread."""

    def __init__(self, settings: Settings, accounts: Accounts) -> None:
        self._settings = settings
        self.accounts = accounts
        self.memory = TurnMemory()
        self.observers: list[Observer] = []
        self.on_gap: Callable[[float, int], None] | None = None  # see Visit
        self.seats: set[Seat] = set()
        self.draining = False
        self.started = time.time()
        self._backend: Backend | None = None
        self._closing: set[asyncio.Task[None]] = set()
        # Threads of its own, so that neither the ledger nor the server's end waits for long prompts.
        self._workers = ThreadPoolExecutor(_WORKERS, "hadal-prepare")

    @property
    def settings(self) -> Settings:
        """The settings of now, for some change while serving."""
        return self._settings.now

    @property
    def loaded(self) -> bool:
        """Whether there is a model to answer."""
        return self._backend is not None

    @property
    def backend(self) -> Backend:
        """Where answers come from; APIError 503 while the model is being loaded."""
        if self._backend is None:
            raise APIError(503, "the model is being loaded; try again shortly", code="loading", retry_after=5)
        return self._backend

    def attach(self, backend: Backend) -> None:
        """Begin to answer with `backend`."""
        backend.start()
        self._backend = backend

    async def close(self) -> None:
        """End what is under way and write what is to be kept."""
        self.draining = True
        if self._backend is not None:
            await asyncio.to_thread(self._backend.close)
        self._workers.shutdown(wait=False, cancel_futures=True)
        for seat in list(self.seats):
            self.leave(seat, APIError.closing())
        await asyncio.gather(*self._closing)

    async def respond(self, request: Request, api: str, ask: Ask, make: MakeWire) -> Response:
        """The HTTP response to `ask`; APIError when it cannot be served."""
        visit = Visit(api, caller(request), on_gap=self.on_gap, traceparent=request.headers.get("traceparent"))
        visit.id = getattr(request.state, "request_id", visit.id)
        visit.show_cost = request.headers.get("x-hadal-cost", "").lower() in ("1", "true", "usd")
        seat = await self.admit(visit, ask)
        try:
            return Reply(self, seat, make(seat.context))
        except Exception:
            self.leave(seat, APIError(500, "the server failed on this request; see its log"))
            raise

    async def work(self, function: Callable[[], _T]) -> _T:
        """What `function` returns, called in a worker thread because it takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    async def count(self, request: Request, function: Callable[[], _T]) -> _T:
        """What `function` returns, called in a worker thread; to the key's limits it is a request without tokens."""

        def counted() -> _T:
            hold = self._enter(caller(request).key, 0, 0)
            try:
                return function()
            finally:
                hold.leave()

        return await self.work(counted)

    def render(self, request: Request, api: str, ask: Ask) -> tuple[int, ...]:
        """The token ids of the prompt that `ask` makes, for a worker thread; APIError when it cannot be served."""
        generations = self._render(self.backend, api, caller(request).tenant(ask.user_id), ask)
        return generations[0].request.prompt_ids

    async def admit(self, visit: Visit, ask: Ask) -> Seat:
        """Check, render and queue what is asked. Whoever gets a seat must `leave` it."""
        visit.model, visit.stream, visit.user_id, visit.priority = ask.model, ask.stream, ask.user_id, ask.priority
        visit.turns = sum(message.get("role") == "assistant" for message in ask.messages or ())
        try:
            return await self._admit(visit, ask)
        except APIError as error:
            self._end(visit, error)
            raise

    async def _admit(self, visit: Visit, ask: Ask) -> Seat:
        backend = self.backend
        self._check_room(backend)
        if ask.effort not in backend.efforts:
            ask = replace(ask, effort="high")  # rules without "low" start at "high", and the answer says so
        preparing = asyncio.ensure_future(self.work(partial(self._prepare, backend, visit, ask)))
        try:
            generations, hold = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(_give_up)
            raise
        try:
            if self.draining:
                self._check_room(backend)
            ticket = backend.open(generations)
        except EngineBusy as error:
            hold.leave()
            raise self._busy(backend, str(error)) from None
        except RequestError as error:
            hold.leave()
            raise APIError(400, str(error), param=error.param) from None
        except BaseException:
            hold.leave()
            raise
        context = Context(visit.id, int(visit.received), ask, generations, backend.tokenizer)
        seat = Seat(visit, ask, ticket, hold, context)
        self.seats.add(seat)
        return seat

    def refusal(self, path: str, who: Caller) -> APIError | None:
        """Why no answer can be asked for at `path` now, or None; seen before the body is read, and counted."""
        api = _APIS.get(path.rpartition("/v1")[2].removeprefix("/beta"))
        if api is None:
            return None
        try:
            self._check_room(self.backend)
        except APIError as error:
            self._end(Visit(api, who), error)
            return error
        return None

    def _check_room(self, backend: Backend) -> None:
        if self.draining:
            raise APIError.closing()
        if not self.accounts.healthy:
            raise APIError.unaccounted("answers cannot be accounted for now")
        load = backend.load
        if load.full:
            raise self._busy(backend, "too many requests run and wait here")
        if load.wait > self.settings.max_wait_seconds:
            raise APIError(
                503,
                f"the server is overloaded: a request would wait about {load.wait:.0f} s; try again later",
                code="overloaded",
                retry_after=min(load.wait, _MOST_RETRY_AFTER),
            )

    def _busy(self, backend: Backend, cause: str) -> APIError:
        wait = min(max(backend.load.wait / 2, 1.0), _MOST_RETRY_AFTER)
        return APIError(429, f"{cause}; send this one again later", code="queue_full", retry_after=wait)

    def _prepare(self, backend: Backend, visit: Visit, ask: Ask) -> tuple[list[Generation], Hold]:
        """In a worker thread: tokenizing a long prompt takes a while."""
        generations = self._render(backend, visit.api, visit.caller.tenant(ask.user_id), ask)
        most = sum(g.request.limit for g in generations)
        return generations, self._enter(visit.caller.key, _prompt_tokens(generations[:: ask.samples]), most)

    def _enter(self, key: Key | None, prompt: int, output: int) -> Hold:
        try:
            return self.accounts.enter(key, prompt, output)
        except LimitReached as error:
            code = "insufficient_balance" if error.status == 402 else "rate_limit_exceeded"
            raise APIError(error.status, str(error), code=code, retry_after=error.retry_after) from None

    def _render(self, backend: Backend, api: str, tenant: str, ask: Ask) -> list[Generation]:
        try:
            if ask.messages is not None:
                recalled = self.memory.recall(
                    tenant, ask.messages, thinking=ask.thinking, tools=bool(ask.tools), strict=ask.strict_history,
                    synthetic=api != "chat",
                )  # fmt: skip
                ask = replace(ask, messages=tuple(recalled))
            return backend.prepare(ask, tenant)
        except ValueError as error:
            if not type(error).__module__.startswith("hadal."):
                raise
            raise APIError(400, str(error), param=getattr(error, "param", None)) from error

    async def follow(self, seat: Seat, patience: float) -> AsyncIterator[list[tuple[int, Delta, Usage | None]]]:
        """What the answers gain, until the last of them has ended; an empty list after `patience` seconds of silence.

        The very last delta comes with the usage, when its row is safe. Raises APIError for what ends the response.
        """
        visit, ticket = seat.visit, seat.ticket
        while ticket.open:
            parts = await ticket.take(self._time_left(visit, patience))
            for index, delta in parts:
                if delta.token_ids:
                    visit.saw(len(delta.token_ids))
                if delta.finish_reason == "error":
                    raise ticket.failure or failure(delta.error, ticket.generations[index].request.stuck)
                if delta.finish_reason == "abort":
                    raise APIError.closing()
                if delta.finish_reason is not None and index == 0:
                    visit.finish_reason = delta.finish_reason
            usage = None if ticket.open else await self._settle(seat)
            last = len(parts) - 1
            yield [(index, delta, usage if i == last else None) for i, (index, delta) in enumerate(parts)]

    def _time_left(self, visit: Visit, most: float) -> float:
        """Seconds to wait for the next delta; APIError for a request that began too late or runs too long."""
        settings, ends = self.settings, []
        if visit.api != "batch":  # which has days
            if visit.first_token is None:
                told = f"the answer has not begun within {settings.start_seconds:g} s; try again later"
                ends.append((settings.start_seconds, told, "start_timeout"))
            if (limit := settings.request_seconds) is not None:
                told = f"the answer took more than {limit:g} s, which is this server's limit"
                ends.append((limit, told, "request_timeout"))
        for seconds, told, code in ends:
            left = visit.began + seconds - time.monotonic()
            if left <= 0:
                raise APIError(503, told, code=code)
            most = min(most, left)
        return max(most, 0.001)

    async def whole(self, seat: Seat, wire: Wire) -> dict[str, object]:
        """The finished response; APIError when there is none."""
        usage = None
        async for parts in self.follow(seat, 3600.0):
            usage = parts[-1][2] if parts else None
        assert usage is not None
        return await asyncio.to_thread(_whole, seat, wire, usage) if seat.scored else _whole(seat, wire, usage)

    async def _settle(self, seat: Seat) -> Usage:
        """Write the row of finished answers; nobody sees their end before it is safe."""
        visit = seat.visit
        usage = self._usage(seat)
        visit.usage = usage
        tenant = visit.caller.tenant(seat.ask.user_id)
        try:
            row = self.accounts.record(self._row(seat, usage))
            if seat.ask.messages is not None:
                await asyncio.to_thread(self._remember, seat, tenant)
            async with asyncio.timeout(_LEDGER_SECONDS):
                await asyncio.wrap_future(row)
        except (AccountsError, TimeoutError) as error:
            raise APIError.unaccounted("the answer is ready and cannot be accounted for") from error
        self.leave(seat)
        return usage if visit.show_cost else replace(usage, cost=None)

    def _remember(self, seat: Seat, tenant: str) -> None:
        """In a worker thread: hashing a long conversation takes a while. The client's next turn waits for it."""
        for generation in seat.ticket.generations:
            self.memory.remember(tenant, seat.ask.messages or (), generation.output(), generation.sampled)

    def _usage(self, seat: Seat) -> Usage:
        generations, samples = seat.ticket.generations, seat.ask.samples
        firsts = range(0, len(generations), samples)
        begun = [generations[i] for i in firsts if any(g.request.admitted for g in generations[i : i + samples])]
        hit = sum(g.request.cached_tokens or 0 for g in begun)
        prompt = _prompt_tokens(begun)  # what never ran is not paid for
        output = sum(g.tokens for g in generations)
        reasoning = sum(g.reasoning_tokens for g in generations)
        cost = self.accounts.cost(hit, prompt - hit, output, _moment(seat.visit.received))
        seat.visit.cost = cost
        return Usage(prompt, hit, output, reasoning, cost)

    def _row(self, seat: Seat, usage: Usage) -> UsageRow:
        visit, first = seat.visit, seat.ticket.generations[0].request
        visit.admitted, visit.cache_reason = first.admitted, first.cache_reason
        visit.malformed = sum(g.malformed for g in seat.ticket.generations)
        return UsageRow(
            id=visit.id, time=_moment(visit.received), api=visit.api, model=visit.model,
            key=visit.caller.key.id if visit.caller.key else None, user=visit.user_id or "",
            tenant=visit.caller.tenant(visit.user_id), priority=visit.priority, batch=visit.batch,
            hit=usage.hit, miss=usage.prompt - usage.hit, output=usage.output, reasoning=usage.reasoning,
            first_token_s=None if visit.first_token is None else visit.first_token - visit.began,
            total_s=time.monotonic() - visit.began, finish_reason=visit.finish_reason, status=visit.status,
            price_list=self.accounts.price_list, cost=usage.cost or Decimal(0),
        )  # fmt: skip

    def leave(self, seat: Seat, error: APIError | None = None) -> None:
        """Give up a seat. One that was left before its end has its row written in the background."""
        if seat.left:
            return
        seat.left = True
        self.seats.discard(seat)
        early = seat.visit.usage is None
        seat.ticket.close()
        if early:
            error = error or APIError(CLIENT_GONE, "the client closed the connection", code="client_gone")
            seat.visit.finish_reason = "abort" if error.status == CLIENT_GONE else "error"
            seat.visit.status = error.status
            seat.visit.usage = usage = self._usage(seat)
            if error.status >= 500:  # what failed here is not to be paid for
                seat.visit.usage = usage = replace(usage, cost=Decimal(0))
                seat.visit.cost = Decimal(0)
            row = self.accounts.record(self._row(seat, usage))
            task = asyncio.ensure_future(_written(row))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        seat.hold.leave()
        self._end(seat.visit, error)

    def _end(self, visit: Visit, error: APIError | None) -> None:
        visit.ended = time.monotonic()
        if error is not None:
            visit.status, visit.error = error.status, error.code
        for observer in self.observers:
            try:
                observer(visit)
            except Exception:
                _log.exception("an observer of visits failed")


def _whole(seat: Seat, wire: Wire, usage: Usage) -> dict[str, object]:
    return wire.whole([generation.output() for generation in seat.ticket.generations], usage)


def _give_up(prepared: asyncio.Future[tuple[list[Generation], Hold]]) -> None:
    """Nobody waits for what a worker thread prepared."""
    if not prepared.cancelled() and not prepared.exception():
        prepared.result()[1].leave()


async def _written(row: Future[None]) -> None:
    try:
        await asyncio.wrap_future(row)
    except AccountsError:
        _log.exception("the row of a request that ended early could not be written")


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _prompt_tokens(generations: Sequence[Generation]) -> int:
    return sum(len(g.request.prompt_ids) for g in generations)
