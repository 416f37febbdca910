"""A real server on a free port around a scripted model, and a plain HTTP call to it."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn
from fastapi import FastAPI

from hadal.accounts import Accounts
from hadal.llm import LLM
from hadal.server import create_app
from hadal.server.backend import Backend, LocalBackend
from hadal.server.service import Service
from hadal.server.settings import Settings
from tests.fakes import scripted_llm
from tests.test_llm import SCRIPT


@dataclass(frozen=True)
class Running:
    """Where the server listens and what it serves."""

    url: str
    llm: LLM
    service: Service

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and parsed JSON of a GET, or of a POST when there is a body (a dict, or raw text)."""
        data = None if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} | headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def active(self) -> int:
        """Requests under way."""
        return len(self.service.seats)


@contextmanager
def running(
    llm: LLM | Backend,
    *,
    accounts: Accounts | None = None,
    prepare: Callable[[FastAPI], None] = lambda app: None,
    **settings: Any,
) -> Iterator[Running]:
    """A server with its data in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        chosen = Settings(**{"model": llm.name, "data": Path(folder)} | settings)
        backend = LocalBackend(llm) if isinstance(llm, LLM) else llm
        app = create_app(backend, chosen, accounts or Accounts(folder=Path(folder)))
        prepare(app)
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", cast(LLM, llm), app.state.service)
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted_llm(SCRIPT, max_concurrent=4)) as it:
        yield it


@pytest.fixture
def start() -> Callable[..., Any]:
    return running
