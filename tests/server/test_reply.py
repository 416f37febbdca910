"""One response on its way: clients that stop reading, mistakes on the way, large answers."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI

from hadal.llm import CompletionOutput, Delta
from hadal.server.wire import Context, Event, Usage
from tests.server.test_service import PlainWire, add_plain_api, plain, rows, send, until


class TornWire(PlainWire):
    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        raise LookupError("no such feed")


class BesideWire(PlainWire):
    """Tells whether it is written in another thread than the one it is made in, which is the event loop's."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.thread = threading.current_thread()

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        beside = threading.current_thread() is not self.thread
        return super().whole(outputs, usage) | {"beside": beside, "half": "\ud800 \u00e9"}


class Deaf:
    """Middleware for a client that stops reading: what follows its first events never gets sent."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sent = 0

        async def stall(message: Any) -> None:
            nonlocal sent
            sent += 1
            await (asyncio.Event().wait() if sent > 3 else send(message))

        await self.app(scope, receive, stall if scope.get("path") == "/plain" else send)


def test_a_client_that_stops_reading_does_not_keep_its_seat() -> None:
    def prepare(app: FastAPI) -> None:
        add_plain_api(app)
        app.add_middleware(Deaf)

    with plain(prepare=prepare, body_seconds=0.3) as server:
        for text in ("endless", "plain"):
            before = len(rows(server))
            response = send(server, text, stream=True)
            assert response.readline()
            until(lambda: not server.active() and not server.llm.busy)
            until(lambda before=before: len(rows(server)) == before + 1)  # type: ignore[misc]
            assert rows(server)[-1]["output"] > 0
            response.close()
        assert [row["finish_reason"] for row in rows(server)] == ["abort", "stop"]


def test_a_mistake_on_the_way_is_an_error_of_the_server_and_frees_the_seat() -> None:
    with plain(prepare=partial(add_plain_api, make=TornWire)) as server:
        with pytest.raises(http.client.IncompleteRead):
            send(server, "endless", stream=True).read()
        until(lambda: not server.active() and not server.llm.busy)
        until(lambda: [(r["status"], int(r["cost"])) for r in rows(server)] == [(500, 0)])


def test_a_large_answer_is_written_beside_the_event_loop() -> None:
    with plain(prepare=partial(add_plain_api, make=BesideWire)) as server:
        for sampling, beside in (({}, False), ({"logprobs": 2}, True), ({"prompt_logprobs": 2}, True)):
            told = json.loads(send(server, "plain", sampling=sampling).read())
            assert told["beside"] is beside and told["half"] == "\ud800 \u00e9"
