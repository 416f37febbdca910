"""Running the application under uvicorn: it answers from the first moment, loads the model meanwhile, and drains."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import uvicorn

from hadal.accounts import Accounts
from hadal.plan.price import PriceError
from hadal.server.app import create_app, open_accounts
from hadal.server.backend import Backend
from hadal.server.guard import SameSite
from hadal.server.health import Startup
from hadal.server.logs import configure_logs, log_visit, make_tracer
from hadal.server.service import Service
from hadal.server.settings import Settings

_HEAD_SECONDS = 60.0  # that a new connection has to say what it wants
_IDLE_SECONDS = 65  # that a connection is kept for another request
_FLUSH_SECONDS = 2  # that connections have to take their last words
_CLOSE_SECONDS = 5.0  # that everything may take to close behind draining
_AT_ONCE_SECONDS = 0.5  # that a second signal leaves for it
_log = logging.getLogger("hadal.server")

Load = Callable[[Callable[[str], None]], Backend]


class ServeError(ValueError):
    """An address or certificate that cannot be used; the message names it and the remedy."""


def run(
    load: Load, settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, threads: int | None = None
) -> None:
    """Serve what `load` makes until interrupted; ServeError when the address or the certificate cannot be used.

    `load` is given a function for lines of progress and called in a thread while the server already answers; what it
    raises ends the server and is raised again. The first SIGTERM or SIGINT lets requests under way end, for at most
    `settings.drain_seconds`, the second ends them; whatever still runs some seconds later ends with the process.
    `threads` is how many CPU threads the model uses. Left out, it
    leaves one core to the HTTP side: a model's threads that wait at a barrier for one the event loop has displaced cost
    far more than the core is worth.
    """
    torch.set_num_threads(threads or min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) - 1)))
    with open_accounts(settings) as accounts, _listen(host, port) as listener:
        _check_address(host, accounts, settings)
        app = create_app(None, settings, accounts)
        service: Service = app.state.service
        service.observers.append(log_visit)
        end_traces: Callable[[], None] = lambda: None  # noqa: E731
        if settings.otel:
            trace, end_traces = make_tracer()
            service.observers.append(trace)
        app.state.startup = startup = Startup()
        guarded = app if settings.open_bind else SameSite(app, lambda: not accounts.has_keys, settings.cors)
        server = _Server(_configure(guarded, settings), service)
        loader = _Loader(load, startup, server, service)
        shown = f"[{host}]" if ":" in host else host
        scheme = "https" if settings.tls_cert else "http"
        address = f"{scheme}://{shown}:{listener.getsockname()[1]}"
        print(f"Hadal serves {settings.model} at {address}/v1", flush=True)
        configure_logs(settings.log_format)
        loader.start()
        server.run(sockets=[listener])
        end_traces()
    if loader.error is not None:
        raise loader.error
    if server.force_exit or loader.is_alive():
        # Threads deep in the loading of weights would be torn out of the interpreter's end.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from None
    return listener


def _check_address(host: str, accounts: Accounts, settings: Settings) -> None:
    if not (is_local(host) or accounts.has_keys or settings.open_bind):
        raise ServeError(
            f"{host} can be reached from other machines and there is no key, so anybody could use this server; make a "
            "key with `hadal keys create NAME`, or say --open"
        )


def is_local(host: str) -> bool:
    """Whether an address is reachable from this machine alone."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _configure(app: Any, settings: Settings) -> uvicorn.Config:
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="on",
        ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key,
        http="h11",  # limits the size of headers
        timeout_keep_alive=_IDLE_SECONDS, timeout_graceful_shutdown=_FLUSH_SECONDS,
    )  # fmt: skip
    try:
        config.load()
    except OSError as error:
        raise ServeError(
            f"cannot use the certificate {settings.tls_cert} with the key {settings.tls_key} ({error}); give PEM files "
            "that belong together"
        ) from None
    config.http_protocol_class = type(
        "Protocol", (_Impatient, config.http_protocol_class), {"patience": settings.body_seconds}
    )
    return config


class _Impatient:
    """Mixin of uvicorn's protocols: closes a connection that does not say what it wants, or takes nothing any more."""

    patience: float  # seconds

    def connection_made(self: Any, transport: Any) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self.loop.call_later(_HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self: Any) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self: Any) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._watch()

    def resume_writing(self: Any) -> None:
        self._timer.cancel()
        super().resume_writing()  # type: ignore[misc]

    def _watch(self: Any) -> None:
        left = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.patience, self._close_if_stuck, left)

    def _close_if_stuck(self: Any, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self.transport.abort()


class _Loader(threading.Thread):
    """Makes the backend beside the running server and hands it over."""

    def __init__(self, load: Load, startup: Startup, server: _Server, service: Service) -> None:
        super().__init__(name="hadal-load", daemon=True)
        self.error: Exception | None = None
        self._load, self._startup, self._server, self._service = load, startup, server, service

    def run(self) -> None:
        """Load; an error ends the server."""
        try:
            backend = self._load(self._progress)
            loop = self._server.wait_for_loop()
            asyncio.run_coroutine_threadsafe(self._attach(backend), loop).result()
        except Exception as error:
            if not self._service.draining:
                self.error = error
                self._server.should_exit = True

    async def _attach(self, backend: Backend) -> None:
        self._service.attach(backend)
        self._progress(f"ready after {time.monotonic() - self._startup.began:.1f} s")

    def _progress(self, line: str) -> None:
        self._startup.note(line)
        _log.info("%s", line)


class _Server(uvicorn.Server):
    """Goes on listening while it drains, so that who comes late is told to try again."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drained: float | None = None  # when draining ends at the latest
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = threading.Event()
        self._refused_list = ""  # of which it was told already
        # Seconds until the process ends in any case; a queue is what a signal handler may use at any moment.
        self._ends: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=self._end_late, name="hadal-end", daemon=True).start()

    def wait_for_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, once the server answers."""
        self._running.wait()
        assert self._loop is not None
        return self._loop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        if self._drained is not None:
            self.should_exit = self.force_exit = True
            self._ends.put(_AT_ONCE_SECONDS)
        else:
            self._drained = time.monotonic() + self._service.settings.drain_seconds
            self._service.draining = True
            self._ends.put(self._service.settings.drain_seconds + _CLOSE_SECONDS)

    def _end_late(self) -> None:
        """A step of the engine and threads of long prompts would keep the process for as long as they take."""
        seconds = None
        with suppress(queue.Empty):
            while True:
                seconds = self._ends.get(timeout=seconds)
        os._exit(0)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; true ends the server."""
        if counter == 0:
            self._loop = asyncio.get_running_loop()
            self._running.set()
            if not self._service.loaded:
                _log.info("listening; the model is being loaded")
        if self._drained is not None and not self.should_exit:
            if self._service.seats and time.monotonic() >= self._drained:
                _log.warning("%d requests did not end in time and are ended now", len(self._service.seats))
                await self._service.close()
            self.should_exit = not self._service.seats
        if counter % 10 == 0:
            self._follow_price_list()
        return await super().on_tick(counter)

    def _follow_price_list(self) -> None:
        wanted, accounts = self._service.settings.price_list, self._service.accounts
        if wanted not in (accounts.price_list, self._refused_list):
            try:
                accounts.price_list = wanted
            except PriceError as error:
                self._refused_list = wanted
                _log.warning("costs are counted by %r on: %s", accounts.price_list, error)
