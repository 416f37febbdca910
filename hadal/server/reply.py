"""Reply: one response on its way to the client, as events or in one piece, until it ends or the client has left."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hadal.server.errors import APIError
from hadal.server.gate import error_response
from hadal.server.wire import Wire, dump

if TYPE_CHECKING:
    from hadal.server.service import Seat, Service

# Pieces of a stream that come closer together travel together: reading speed is far below, and every event costs time
# that the engine could use. The more streams there are, the longer is the pause of each.
_LEAST_PAUSE = 0.02
_EVENTS_PER_SECOND = 800.0
_ENCODER = json.JSONEncoder(separators=(",", ":"))


class Reply(Response):
    """Sends what `seat` brings in the shape of `wire`; the seat is left when sending ends, however it ends."""

    def __init__(self, service: Service, seat: Seat, wire: Wire) -> None:
        super().__init__(
            headers=_headers(seat), media_type="text/event-stream" if seat.ask.stream else "application/json"
        )
        del self.headers["content-length"]
        self._service, self._seat, self._wire = service, seat, wire
        self._began = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until done, or until the client is gone or reads no more: the engine drops the answer within a step."""
        seconds = self._service.settings.body_seconds

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(seconds):
                await send(message)

        sending = self._stream(send_in_time) if self._seat.ask.stream else self._whole(scope, receive, send_in_time)
        work = asyncio.ensure_future(sending)
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except OSError:
            pass  # the connection broke while sending, or took nothing for too long
        except Exception:
            self._service.leave(self._seat, APIError(500, "the server failed on this request; see its log"))
            raise
        finally:
            self._service.leave(self._seat)
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _start(self, send: Send) -> None:
        self._began = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _stream(self, send: Send) -> None:
        wire, seat, service = self._wire, self._seat, self._service
        patience = service.settings.keep_alive_seconds
        tail = b"" if wire.done is None else f"data: {wire.done}\n\n".encode()
        await self._start(send)
        await _body(send, b"".join(event.encode() for event in wire.opening()))
        sent = time.monotonic()
        try:
            async for parts in service.follow(seat, patience):
                told = [e.encode() for index, delta, usage in parts for e in wire.feed(index, delta, usage)]
                ended = not seat.ticket.open
                if told or ended:
                    await _body(send, b"".join(told) + (tail if ended else b""))
                elif time.monotonic() >= sent + patience:
                    await _body(send, wire.keep_alive)
                else:
                    continue  # the model writes, but nothing that can be told yet
                sent = time.monotonic()
                if not ended:
                    await asyncio.sleep(max(_LEAST_PAUSE, len(service.seats) / _EVENTS_PER_SECOND))
        except APIError as error:  # the status line is long gone: the error travels as an event
            service.leave(seat, error)
            await _body(send, b"".join(event.encode() for event in wire.failed(error)) + tail)
        await _body(send, b"", more=False)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A slow answer's connection is kept open by blank lines; from then on an error can only break it off."""
        service, seat = self._service, self._seat
        answer = asyncio.ensure_future(self._written())
        try:
            while not (await asyncio.wait({answer}, timeout=service.settings.keep_alive_seconds))[0]:
                if not self._began:
                    await self._start(send)
                await _body(send, b"\n")
            try:
                body = answer.result()
            except APIError as error:
                service.leave(seat, error)
                if self._began:
                    raise ConnectionAbortedError(error.message) from error
                await error_response(scope["path"], error, dict(self.headers))(scope, receive, send)
                return
            if not self._began:
                self._tell_cost()
                self.headers["content-length"] = str(len(body))
                await self._start(send)
            await _body(send, body, more=False)
        finally:
            answer.cancel()

    async def _written(self) -> bytes:
        told = await self._service.whole(self._seat, self._wire)
        if not self._seat.scored:
            return dump(told).encode()
        # Piece by piece, since encoding at one go lets no other thread in, the event loop's neither.
        return await asyncio.to_thread(lambda: "".join(_ENCODER.iterencode(told)).encode())

    def _tell_cost(self) -> None:
        if self._seat.visit.show_cost:
            self.headers["x-hadal-cost"] = f"{self._seat.visit.cost or 0:f} USD"


def _headers(seat: Seat) -> dict[str, str]:
    """What was understood is echoed: the thinking in effect, and parameters that have no effect."""
    ask = seat.ask
    headers: dict[str, str] = {}
    if ask.messages is not None:
        headers["x-hadal-thinking"] = ask.effort if ask.thinking else "disabled"
    if ask.ignored:
        headers["x-hadal-ignored"] = ", ".join(ask.ignored)
    if ask.stream:
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return headers


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(send: Send, data: bytes, *, more: bool = True) -> None:
    if data or not more:
        await send({"type": "http.response.body", "body": data, "more_body": more})
