"""Batches: runs files of requests when nobody else asks, line by line, across restarts of the server."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy.engine import Row

from hadal.accounts import Key
from hadal.server.anthropic import MessagesRequest
from hadal.server.ask import Ask
from hadal.server.backend import BACKGROUND
from hadal.server.chat import ChatBody
from hadal.server.completions import CompletionBody
from hadal.server.errors import APIError, validation_error
from hadal.server.files import sweep
from hadal.server.lines import Made, check, line_id, numbered, problem, read_line
from hadal.server.responses import ResponsesRequest
from hadal.server.service import Seat, Service
from hadal.server.store import KINDS, Store, made_id, on_disk
from hadal.server.visit import Caller, Visit
from hadal.server.wire import MakeWire, Wire

_log = logging.getLogger("hadal.server")
_IN_FLIGHT = 64  # lines of all batches
_TRIES = 3  # of a line that the engine fails on: the cause may have been its company
_LOOK_SECONDS = 1.0
_SWEEP_SECONDS = 60.0
_PAUSE_SECONDS = 10.0  # before a batch that disk or database stopped goes on
_ROOM_SECONDS = 0.01
_T = TypeVar("_T")


# What a batch can be for, and the body of its requests.
BODIES: Mapping[str, Any] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/anthropic/v1/messages": MessagesRequest,
}


@dataclass(eq=False)
class _Run:
    """One batch under way."""

    row: Row[Any]
    key: Key | None
    made: Made
    end: tuple[str, APIError] | None = None  # the status it ends with early, and why its other lines have no answer
    feeding: bool = False
    told: tuple[int, int] = (0, 0)  # the counts that the database has
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # one line at a time goes to the door
    task: asyncio.Task[None] = field(init=False)

    def cut(self, status: str, error: APIError) -> None:
        """End it early."""
        if self.end is None and self.feeding:
            self.end = status, error
            self.task.cancel()


class Batches:
    """Runs the batches of all keys, one of each key at a time, as long as it is started and the service serves."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.store = Store(service.accounts.database, service.settings.data)
        self._runs: dict[str, _Run] = {}
        self._wake = asyncio.Event()
        self._door = asyncio.Lock()  # runs take turns at it
        self._flying = 0
        self._disk = ThreadPoolExecutor(1, "hadal-batches")  # one thread, so that what is written has an order
        self._keys: dict[str, Key] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for batches."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Leave everything as it is; lines under way are run again another time."""
        for tasks in ([self._task] if self._task else [], [run.task for run in self._runs.values()]):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._disk.shutdown)

    def wake(self) -> None:
        """Look for batches now."""
        self._wake.set()

    async def _work(self) -> None:
        lock: int | None = None
        swept = float("-inf")
        try:
            while True:
                self._wake.clear()
                try:
                    if lock is None:
                        lock = await asyncio.to_thread(_lock, self.store.folder.with_suffix(".lock"))
                    if lock is not None:
                        await self._look()
                        if time.monotonic() > swept + _SWEEP_SECONDS:
                            swept = time.monotonic()
                            await asyncio.to_thread(sweep, self.store)
                except (APIError, OSError) as error:
                    _log.warning("batches wait: %s", error)
                except Exception:
                    _log.exception("batches wait")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):  # wait_for may lose a cancellation
                        await self._wake.wait()
        finally:
            if lock is not None:
                os.close(lock)

    async def _look(self) -> None:
        """Bring every batch a step on that needs one."""
        before = set(self._runs)
        rows = await asyncio.to_thread(self.store.open_batches)
        if rows:
            self._keys = {key.id: key for key in await asyncio.to_thread(self.service.accounts.keys.list)}
        for row in rows:
            if row.id in before and row.id not in self._runs:
                continue  # it has ended since
            try:
                await self._bring_on(row)
            except (APIError, OSError) as error:
                _log.warning("batch %s waits: %s", row.id, error)

    async def _bring_on(self, row: Row[Any]) -> None:
        run, end = self._runs.get(row.id), self._end_of(row)
        if row.status == "validating":
            await asyncio.to_thread(self._validate, row)
            self.wake()
        elif run is not None:
            run.key = self._keys.get(row.key)
            if end is not None:
                run.cut(*end)
            counts = run.made.counts["output"], run.made.counts["error"]
            if run.feeding and counts != run.told:
                await asyncio.to_thread(self.store.count, row.id, *counts)
                run.told = counts
        elif not self.service.draining and (end or row.key not in [other.row.key for other in self._runs.values()]):
            paths = {kind: self.store.path(made_id(row.id, kind)) for kind in KINDS}
            made = await self._on_disk(partial(Made, paths))
            run = self._runs[row.id] = _Run(row, self._keys.get(row.key), made, end)
            run.task = asyncio.create_task(self._run(run))

    def _end_of(self, row: Row[Any]) -> tuple[str, APIError] | None:
        """The status that a batch must end with now, and why its lines have no answer."""
        if row.status == "cancelling":
            return "cancelled", APIError(400, "the batch was cancelled before this request ran", code="batch_cancelled")
        if row.status == "in_progress":
            if self.store.clock() >= row.expires_at:
                message = "this request did not run before the completion window of its batch ended"
                return "expired", APIError(400, message, code="batch_expired")
            key = self._keys.get(row.key)
            if row.key and (key is None or key.revoked or (key.expires and key.expires.timestamp() <= time.time())):
                message = "the key that made the batch is not valid any more; make a batch with another"
                return "failed", APIError(401, message, code="invalid_api_key")
        return None

    def _validate(self, row: Row[Any]) -> None:
        try:
            total, errors = check(self.store.path(row.input_file_id), row.endpoint, self.service.settings.body_limit)
        except FileNotFoundError:
            gone = APIError(404, "the input file was deleted; upload it again", param="input_file_id", code="file_gone")
            total, errors = 0, [problem(gone)]
        if errors:
            self.store.change(row.id, ("validating",), "failed", errors=errors, total=total)
        else:
            self.store.change(row.id, ("validating",), "in_progress", total=total)

    async def _run(self, run: _Run) -> None:
        try:
            if run.end is None:
                run.feeding = True
                try:
                    await self._feed(run)
                except asyncio.CancelledError:
                    if run.end is None:
                        raise
                    run.task.uncancel()
                finally:
                    run.feeding = False
            if run.end is not None or not self.service.draining:
                await self._finish(run)
        except Exception as error:
            parts = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
            trace = None if all(isinstance(part, APIError | OSError) for part in parts) else error
            _log.error("batch %s waits %g s: %s", run.row.id, _PAUSE_SECONDS, parts[0], exc_info=trace)
            await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            with suppress(OSError):
                await self._on_disk(run.made.close)
            del self._runs[run.row.id]
            self.wake()

    async def _feed(self, run: _Run) -> None:
        limits, limit = run.key.limits if run.key else None, self.service.settings.body_limit
        # A key's own requests must find room beside its batch.
        most = min(_IN_FLIGHT, max(1, limits.concurrent // 2) if limits and limits.concurrent else _IN_FLIGHT)
        room = asyncio.Semaphore(most)

        def leave(places: int) -> None:
            for _ in range(places):
                room.release()

        with self.store.path(run.row.input_file_id).open("rb") as file:
            lines = numbered(file, limit)
            async with asyncio.TaskGroup() as group:
                while (found := await asyncio.to_thread(_next, run, lines)) is not None:
                    id, raw = found
                    places = 1 + len(raw) * (most - 1) // (limit + 1)  # so that all together are not much more than one
                    for _ in range(places):
                        await room.acquire()
                    if self.service.draining:
                        return
                    task = group.create_task(self._line(run, id, raw))
                    task.add_done_callback(lambda _, places=places: leave(places))  # type: ignore[misc]

    async def _line(self, run: _Run, id: str, raw: bytes) -> None:
        """Run one line until it has an answer or an error of its own."""
        line = await asyncio.to_thread(read_line, raw, run.row.endpoint, self.service.settings.body_limit)
        del raw
        tries = 0
        while not self.service.draining:
            try:
                body = await self._answer(run, id, line.body)
            except APIError as error:
                tries += error.status == 500
                if self.service.draining:
                    return
                if error.status == 402:
                    return run.cut("failed", error)
                if (wait := _patience(error, tries)) is not None:
                    await asyncio.sleep(wait)
                    continue
                said = error.anthropic_body if "messages" in run.row.endpoint else error.body
                kind, status, body = "error", error.status, said
            else:
                kind, status = "output", 200
            response = {"status_code": status, "request_id": id, "body": body}
            told = {"custom_id": line.custom_id, "response": response, "error": None}
            return await self._on_disk(partial(run.made.append, kind, id, told))

    async def _answer(self, run: _Run, id: str, given: dict[str, Any]) -> dict[str, Any]:
        service = self.service
        try:
            ask, make = await asyncio.to_thread(self._read, run.row.endpoint, given)
            async with run.turn, self._door:
                await self._room()
                visit = Visit("batch", Caller(run.key), batch=run.row.id, id=id)
                seat = await _admit(service, visit, ask)
            self._flying += 1
            try:
                return await self._whole(seat, make(seat.context))
            except BaseException as error:
                visit.id = uuid.uuid4().hex  # the row of an attempt must not stand in the way of the answer's
                cause = run.end[1] if run.end else APIError.closing()
                service.leave(seat, error if isinstance(error, APIError) else cause)
                raise
            finally:
                self._flying -= 1
        except APIError:
            raise
        except Exception as error:
            _log.exception("a line of batch %s failed", run.row.id)
            raise APIError(500, "the server failed on this request; see its log") from error

    async def _whole(self, seat: Seat, wire: Wire) -> dict[str, Any]:
        """The service's `whole`, which can be cancelled until its row is on its way: what is paid for is kept."""
        answering = asyncio.ensure_future(self.service.whole(seat, wire))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            if seat.visit.usage is not None:
                return await answering
            answering.cancel()
            raise

    def _read(self, endpoint: str, given: dict[str, Any]) -> tuple[Ask, MakeWire]:
        try:
            body = BODIES[endpoint].model_validate(given)
        except ValidationError as error:
            raise validation_error(error.errors()) from None
        ask: Ask = body.ask(self.service.settings)
        if ask.stream:
            raise APIError(422, "`stream` has no meaning in a batch; remove it", param="stream")
        return replace(ask, priority=BACKGROUND), body.wire

    async def _room(self) -> None:
        """Wait until a line would soon find a place to run: batches make no queue that others would stand in."""
        service = self.service
        while not service.draining:
            if service.loaded and service.accounts.healthy:
                load = service.backend.load
                if not load.full and load.waiting <= load.running // 4 and self._flying < _IN_FLIGHT:
                    return
            await asyncio.sleep(_ROOM_SECONDS)
        raise APIError.closing()

    async def _finish(self, run: _Run) -> None:
        row, status = run.row, "completed"
        if run.end is not None:
            status, error = run.end
            await self._on_disk(lambda: self._write_off(run, error))
        elif not await asyncio.to_thread(self.store.change, row.id, ("in_progress", "finalizing"), "finalizing"):
            return  # cancelled in the very last moment
        counts = run.made.counts
        sizes = await self._on_disk(run.made.close)
        values: dict[str, Any] = {"succeeded": counts["output"], "erred": counts["error"]}
        if status == "failed":
            assert run.end is not None
            values["errors"] = [problem(run.end[1])]
        rows = []
        for kind, size in sizes.items():
            made = self.store.stamp("") | {"id": made_id(row.id, kind), "key": row.key, "purpose": "batch_output"}
            expires = row.output_seconds and made["created"] // 10**6 + row.output_seconds
            rows.append(made | {"filename": f"{row.id}_{kind}.jsonl", "bytes": size, "expires": expires})
            values[f"{kind}_file_id"] = made["id"]
        await asyncio.to_thread(self.store.end, row.id, status, rows, **values)

    def _write_off(self, run: _Run, error: APIError) -> None:
        """Say of every line that has no answer why it has none."""
        limit = self.service.settings.body_limit
        if run.row.in_progress_at is None:
            return  # its lines were never looked at
        with on_disk(), self.store.path(run.row.input_file_id).open("rb") as file:
            for number, raw in numbered(file, limit):
                name = read_line(raw, run.row.endpoint, limit).custom_id
                told = {"code": error.code, "message": error.message}
                line = {"custom_id": name, "response": None, "error": told}
                run.made.append("error", line_id(run.row.id, number), line, sync=False)

    async def _on_disk(self, what: Callable[[], _T]) -> _T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._disk, what))


def _next(run: _Run, lines: Iterator[tuple[int, bytes]]) -> tuple[str, bytes] | None:
    """The next line that is not done, under its id."""
    named = ((line_id(run.row.id, number), raw) for number, raw in lines)
    return next((line for line in named if line[0] not in run.made.done), None)


async def _admit(service: Service, visit: Visit, ask: Ask) -> Seat:
    """The service's `admit`, whose seat is left when the line is cancelled before it has it."""
    admitting = asyncio.ensure_future(service.admit(visit, ask))
    try:
        return await asyncio.shield(admitting)
    except asyncio.CancelledError:
        visit.id = uuid.uuid4().hex
        admitting.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() else service.leave(done.result())
        )
        raise


def _patience(error: APIError, tries: int) -> float | None:
    """Seconds until a line is tried again; None when that is of no use."""
    if error.status == 500:
        return 0.0 if tries < _TRIES else None
    if error.status not in (429, 503) or (error.code == "rate_limit_exceeded" and error.retry_after is None):
        return None
    return min(error.retry_after or 1.0, 60.0)


def _lock(path: Path) -> int | None:
    """A lock that only one process has, until it ends in whatever way; None while another has it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
