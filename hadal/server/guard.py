"""The guard: what holds for every request before and after its endpoint; pure ASGI, so that streams pass untouched."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
import uuid
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hadal.server.errors import APIError
from hadal.server.gate import error_response
from hadal.server.settings import Settings

_LEAST_RATE = 64 << 10  # bytes per second that a body must come at
_FORM_BYTES = 64 << 10  # of an upload besides its file
_log = logging.getLogger("hadal.server")
# Answers are data: a browser is to show, frame or run none of them. The page brings a policy of its own.
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


def protect(app: FastAPI, settings: Settings) -> None:
    """Put `app` behind a Guard, and before that CORS where origins are named; call it after adding other middleware."""
    app.add_middleware(
        Guard, body_limit=settings.body_limit, body_seconds=settings.body_seconds, file_limit=settings.file_limit
    )
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )


class Guard:
    """Numbers every request, adds headers to every response, and answers for the app when that fails.

    A body of more than `body_limit` bytes is refused with 413 before it is read when its length is told and as soon as
    it is passed otherwise; one that has not begun within `body_seconds`, or comes slower than 64 KiB/s from then on,
    with 408. Uploads of files have a limit of their own. The request's number is at `request.state.request_id` and in
    the header `x-request-id`.
    """

    def __init__(self, app: ASGIApp, *, body_limit: int, body_seconds: float, file_limit: int) -> None:
        self._app = app
        self._limit, self._seconds, self._file_limit = body_limit, body_seconds, file_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        number = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        started = False
        limit = self._file_limit + _FORM_BYTES if scope["path"].endswith("/files") else self._limit
        body = _Body(receive, limit, self._seconds, Headers(scope=scope))

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = number  # OpenAI's and Anthropic's name for it
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not body.whole:
                    headers["connection"] = "close"
            elif not body.whole and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            body.check_length()
            await self._app(scope, body.receive, body.unless_refused(send_guarded))
        except ClientDisconnect:
            return
        except Exception as error:
            if started:
                raise  # nothing can be told any more: the connection breaks off
            if body.refusal is None:
                _log.exception("request %s failed", number, exc_info=error)
        if body.refusal is not None and not started:
            await error_response(scope["path"], body.refusal)(scope, receive, send_guarded)
        elif not started:
            failed = APIError(500, f"the server failed on this request; its log tells why under {number}")
            await error_response(scope["path"], failed)(scope, receive, send_guarded)


class _Body:
    """The receiving side of one request, with its limits."""

    def __init__(self, receive: Receive, limit: int, seconds: float, headers: Headers) -> None:
        self.refusal: APIError | None = None
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._length = int(headers.get("content-length", 0))  # the HTTP server has checked that it is a number
        self.whole = not self._length and "transfer-encoding" not in headers
        self._size, self._deadline = 0, 0.0

    def check_length(self) -> None:
        """Refuse by what the client says itself."""
        if self._length > self._limit:
            self._refuse(413, f"the body is larger than {self._limit:,} bytes, which is this server's limit; send less")

    async def receive(self) -> Message:
        """The app's `receive`."""
        if self.whole:
            return await self._receive()  # which waits for the client to leave
        message = await self._next()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            self._refuse(413, f"the body is larger than {self._limit:,} bytes, which is this server's limit; send less")
        return message

    async def _next(self) -> Message:
        self._deadline = self._deadline or time.monotonic() + self._seconds
        try:
            async with asyncio.timeout(self._deadline + self._size / _LEAST_RATE - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self._refuse(408, "the body did not arrive in time; send it again over a faster line", "body_timeout")
        self.whole = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def drain(self) -> None:
        """Read on for a while: a client that still sends would otherwise never look at the refusal."""
        limit = self._size + self._limit
        try:
            while not self.whole and self._size < limit:
                self._size += len((await self._next()).get("body", b""))
        except _Refused:
            return

    def unless_refused(self, send: Send) -> Send:
        """The app's `send`: what an app makes of a broken body is not what the client is told."""

        async def send_or_drop(message: Message) -> None:
            if self.refusal is None:
                await send(message)

        return send_or_drop

    def _refuse(self, status: int, message: str, code: str = "request_too_large") -> NoReturn:
        self.refusal = self.refusal or APIError(status, message, code=code)
        raise _Refused(message)


class _Refused(Exception):
    """The body is not to be read on."""


class SameSite:
    """Keeps other sites in a browser of this machine away from a server that asks for no key.

    `open_to_all` tells whether it is so now. Such a server answers only under an address or as localhost, which no
    foreign name can be made to mean, and to no page of another origin than its own and those of `cors`.
    """

    def __init__(self, app: ASGIApp, open_to_all: Callable[[], bool], cors: tuple[str, ...] = ()) -> None:
        self._app, self._open_to_all, self._cors = app, open_to_all, cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (cause := self._cause(Headers(scope=scope))) and self._open_to_all():
            error = APIError(
                403, f"{cause}; create a key with `hadal keys` to be reached that way", code="foreign_site"
            )
            return await error_response(scope["path"], error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _cause(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if not _is_own(host):
            return f"a server without keys answers under an address or localhost only, not as {host!r}"
        own = (f"http://{host}".lower(), f"https://{host}".lower())
        foreign = origin == "null" or (origin.lower().startswith("http") and origin.lower() not in own)
        if foreign and origin not in self._cors and "*" not in self._cors:
            return f"a server without keys answers no page of {origin!r}"
        return None


def _is_own(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
