"""Bodies that are made to cost much: they are refused soon, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from hadal.server.backend import LocalBackend
from tests.fakes import scripted_llm
from tests.server.chatting import chat
from tests.server.conftest import Running, running

CHAT, MESSAGES = "/v1/chat/completions", "/anthropic/v1/messages"
PATIENCE = 2.5  # seconds; the bodies below held everybody up for 5 to 18


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted_llm({"greet": "yes"}, max_concurrent=4)) as it:
        yield it


def longest_wait(server: Running, work: Callable[[], Any]) -> float:
    """Seconds that the slowest of many small requests took while `work` ran."""
    worst, done = 0.0, threading.Event()

    def ask() -> None:
        nonlocal worst
        while not done.is_set():
            began = time.monotonic()
            assert server.call("/livez")[0] == 200
            worst = max(worst, time.monotonic() - began)
            time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return worst


def messages(content: Any) -> dict[str, Any]:
    return {"model": "scripted", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}


BODIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "stop ids out of range": (CHAT, lambda: chat(stop_token_ids=[-1] * 600_000)),
    "messages that are none": (CHAT, lambda: chat(messages=[{"x": 1}] * 200_000)),
    "fields that nobody knows": (CHAT, lambda: chat() | {f"field{i}": 1 for i in range(400_000)}),
    "parts that are none": (MESSAGES, lambda: messages([{"x": 1}] * 300_000)),
    "parts within the limit, in many messages": (
        MESSAGES,
        lambda: messages("") | {"messages": messages([{"type": "text", "text": ""}] * 9_000)["messages"] * 60},
    ),
    "a name full of brackets": ("/v1/completions", lambda: {"model": "claude-" + "[" * 90_000, "prompt": "greet"}),
    "a key full of brackets": (CHAT, lambda: chat(logit_bias={"[" * 90_000 + "\ud800": 1})),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_costly_body_is_refused_and_holds_up_nobody(server: Running, name: str) -> None:
    path, make = BODIES[name]
    body = json.dumps(make())
    told: list[Any] = []
    assert longest_wait(server, lambda: told.append(server.call(path, body))) < PATIENCE
    ((status, answer),) = told
    assert status == 422 and len(json.dumps(answer)) < 2000, answer


def test_long_prompts_take_no_thread_from_anything_else(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(server.service.backend, "prepare", lambda *_: (free.wait(20), (_ for _ in ()).throw(KeyError)))
    threads = [threading.Thread(target=server.call, args=(CHAT, chat())) for _ in range(12)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.2)
        loop = cast(LocalBackend, server.service.backend)._loop
        assert asyncio.run_coroutine_threadsafe(asyncio.to_thread(lambda: 1), loop).result(5) == 1
    finally:
        free.set()
        for thread in threads:
            thread.join()
