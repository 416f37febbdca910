"""What all APIs share, seen through the plainest of wires: admission, streams, times, the ledger, leaving."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Request

from hadal.accounts import Accounts, AccountsError, Limits
from hadal.llm import CompletionOutput, Delta
from hadal.server.ask import Ask
from hadal.server.errors import APIError
from hadal.server.wire import Context, Event, Usage
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.conftest import Running, running

SCRIPT: dict[str, str | None] = {"plain": "one. two. three.", "broken": None}
LENGTH = len(small_tokenizer().encode("one. two. three.")) + 1  # the end of sentence counts


class PlainWire:
    """Every delta as an event."""

    done = "[DONE]"
    keep_alive = b": still here\n\n"

    def __init__(self, context: Context) -> None:
        self.context = context

    def opening(self) -> list[Event]:
        return [Event({"id": self.context.id})]

    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        ended = {"end": delta.finish_reason} if delta.finish_reason else {}
        used = {"usage": usage.to_openai()} if usage else {}
        return [Event({"index": index, "text": delta.text} | ended | used)] if delta.text or ended else []

    def failed(self, error: APIError) -> list[Event]:
        return [Event(error.body)]

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        return {"texts": [output.text for output in outputs], "usage": usage.to_openai()}


class UnmadeWire(PlainWire):
    def __init__(self, context: Context) -> None:
        raise LookupError("no such wire")


def add_plain_api(app: FastAPI, make: Any = PlainWire) -> None:
    service = app.state.service

    async def plain(request: Request) -> Any:
        body = await request.json()
        messages = ({"role": "user", "content": body.pop("text")},)
        body["sampling"] = {"max_tokens": 200_000} | body.get("sampling", {})
        return await service.respond(request, "plain", Ask("scripted", messages, **body), make)

    app.add_route("/plain", plain, methods=["POST"])


@contextmanager
def plain(
    script: dict[str, str | None] = SCRIPT, *, engine: Any = None, prepare: Any = add_plain_api, **options: Any
) -> Iterator[Running]:
    llm = scripted_llm(script, **({"context": 300_000, "max_concurrent": 2} | (engine or {})))
    with running(llm, prepare=prepare, **options) as server:
        yield server


def post(server: Running, **headers: str) -> http.client.HTTPConnection:
    host, port = server.url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=20)


def send(server: Running, text: str, headers: dict[str, str] | None = None, **ask: Any) -> http.client.HTTPResponse:
    connection = post(server)
    connection.request("POST", "/plain", json.dumps({"text": text} | ask), headers or {})
    return connection.getresponse()


def events(response: http.client.HTTPResponse) -> list[Any]:
    raw = response.read().decode().split("\n\n")
    return [json.loads(e[6:]) if e != "data: [DONE]" else "done" for e in raw if e.startswith("data: ")]


def rows(server: Running) -> list[Any]:
    with sa.create_engine(f"sqlite:///{server.service.settings.data}/hadal.db").connect() as connection:
        return list(connection.execute(sa.text("select * from ledger")).mappings())


def until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_a_stream_opens_tells_and_ends_with_usage_and_the_sentinel() -> None:
    with plain() as server:
        response = send(server, "plain", stream=True)
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        opening, *told, last, done = events(response)
        assert set(opening) == {"id"} and done == "done"
        assert "".join(e["text"] for e in [*told, last]) == "one. two. three."
        assert last["end"] == "stop" and last["usage"]["completion_tokens"] == LENGTH
        assert not any("usage" in e for e in told)


def test_the_row_is_there_before_the_client_sees_the_end() -> None:
    with plain() as server:
        response = send(server, "plain", stream=True)
        while b"usage" not in response.readline():
            pass
        (row,) = rows(server)
        assert (row["api"], row["output"], row["finish_reason"], row["status"]) == ("plain", LENGTH, "stop", 200)
        assert row["hit"] + row["miss"] > 0 and row["total_s"] >= row["first_token_s"] > 0


def test_samples_of_one_prompt_are_counted_once_in_and_each_out() -> None:
    with plain() as server:
        body = json.loads(send(server, "plain", sampling={"n": 3}).read())
        alone = json.loads(send(server, "plain").read())
        assert body["texts"] == ["one. two. three."] * 3
        assert body["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
        assert body["usage"]["completion_tokens"] == 3 * alone["usage"]["completion_tokens"]


def test_a_client_that_leaves_stops_the_work_and_is_still_in_the_ledger() -> None:
    with plain() as server:
        for stream in (True, False):
            before = len(rows(server))
            connection = post(server)
            connection.request("POST", "/plain", json.dumps({"text": "endless", "stream": stream}))
            until(lambda: server.llm.engine.stats.generated > 5)
            connection.sock.close()
            connection.close()
            until(lambda: not server.llm.busy and not server.active())
            until(lambda before=before: len(rows(server)) == before + 1)  # type: ignore[misc]
            assert rows(server)[-1]["finish_reason"] == "abort" and rows(server)[-1]["status"] == 499


def test_what_never_ran_is_not_paid_for() -> None:
    with plain(engine={"max_concurrent": 1}) as server:
        running_one = send(server, "endless", stream=True)
        waiting = post(server)
        waiting.request("POST", "/plain", json.dumps({"text": "plain" * 100, "sampling": {"n": 2}}))
        until(lambda: server.active() == 2)
        waiting.sock.close()
        waiting.close()
        until(lambda: rows(server))
        (row,) = rows(server)
        assert row["status"] == 499 and row["hit"] == row["miss"] == row["output"] == row["cost"] == 0
        running_one.close()
        until(lambda: len(rows(server)) == 2)
        assert rows(server)[1]["miss"] > 0 and rows(server)[1]["cost"] > 0


def test_a_mistake_before_an_answer_begins_frees_its_seat() -> None:
    with plain(prepare=partial(add_plain_api, make=UnmadeWire)) as server:
        assert send(server, "endless").status == 500
        until(lambda: not server.active() and not server.llm.busy)
        until(lambda: [(r["status"], int(r["cost"])) for r in rows(server)] == [(500, 0)])


def test_what_the_model_cannot_answer_is_an_error_in_both_ways() -> None:
    with plain() as server:
        assert send(server, "broken").status == 500
        *_, error, done = events(send(server, "broken", stream=True))
        assert error["error"]["code"] == "engine_error" and done == "done"
        until(lambda: [r["status"] for r in rows(server)] == [500, 500])


def test_a_form_that_cannot_go_on_is_the_fault_of_the_request() -> None:
    with plain() as server:
        body = {"model": "scripted", "prompt": "x", "regex": "(a{995}){1000}"}
        status, told = server.call("/v1/completions", body)
        assert (status, told["error"]["code"]) == (400, "grammar_failed")
        connection = post(server)
        told = json.dumps(body | {"stream": True})
        connection.request("POST", "/v1/completions", told, {"content-type": "application/json"})
        assert events(connection.getresponse())[-2]["error"]["code"] == "grammar_failed"
        until(lambda: [(r["status"], r["finish_reason"]) for r in rows(server)] == [(400, "error")] * 2)
        with urllib.request.urlopen(server.url + "/metrics") as metrics:
            assert 'vllm:corrupted_requests_total{model_name="scripted"} 0' in metrics.read().decode()


def test_an_answer_that_does_not_begin_in_time_is_closed() -> None:
    with plain(start_seconds=0.3, engine={"max_concurrent": 1}) as server:
        first = send(server, "endless", stream=True)
        *_, error, _ = events(send(server, "plain", stream=True))
        assert error["error"]["code"] == "start_timeout"
        whole = send(server, "plain")
        assert whole.status == 503 and json.loads(whole.read())["error"]["code"] == "start_timeout"
        first.close()


def test_an_answer_that_takes_too_long_is_closed() -> None:
    with plain(request_seconds=0.3) as server:
        began = time.monotonic()
        *_, error, _ = events(send(server, "endless", stream=True))
        assert error["error"]["code"] == "request_timeout" and time.monotonic() - began < 5


def test_silence_is_filled_while_a_request_waits() -> None:
    with plain(keep_alive_seconds=0.1, request_seconds=0.6, engine={"max_concurrent": 1}) as server:
        first = send(server, "endless", stream=True)
        assert b": still here" in send(server, "plain", stream=True).read()
        assert first.status == 200


def test_a_whole_answer_that_takes_long_is_kept_alive_by_blank_lines() -> None:
    with plain(keep_alive_seconds=0.05) as server:
        response = send(server, "endless", sampling={"max_tokens": 700})
        raw = response.read()
        assert raw.startswith(b"\n") and len(json.loads(raw)["texts"][0]) == 700


def test_a_burst_beyond_the_queue_gets_429_with_a_time_never_a_broken_stream() -> None:
    with plain(engine={"max_concurrent": 1, "max_waiting": 2}) as server:
        statuses: list[int] = []
        held: list[Any] = []

        def one() -> None:
            response = send(server, "endless", stream=True, sampling={"max_tokens": 500})
            statuses.append(response.status)
            if response.status == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert json.loads(response.read())["error"]["code"] == "queue_full"
            else:
                held.append(events(response)[-2])

        threads = [threading.Thread(target=one) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(statuses) == [200] * 3 + [429] * 9
        assert all(e["end"] == "length" for e in held)


def test_who_finds_no_room_is_told_before_the_body_is_read() -> None:
    with plain(engine={"max_concurrent": 1, "max_waiting": 1}) as server:
        held = [send(server, "endless", stream=True) for _ in range(2)]
        assert server.call("/v1/chat/completions", "no json")[0] == 429
        assert server.call("/anthropic/v1/messages", "no json")[1]["error"]["type"] == "rate_limit_error"
        assert server.call("/v1/tokenize", {"prompt": "a"})[0] == 200
        for response in held:
            response.close()
        until(lambda: server.call("/v1/chat/completions", "no json")[0] == 400)


def test_more_answers_than_can_ever_run_and_wait_are_refused_for_good() -> None:
    with plain(engine={"max_concurrent": 1, "max_waiting": 2}) as server:
        refused = send(server, "plain", sampling={"n": 4})
        assert refused.status == 400 and json.loads(refused.read())["error"]["param"] == "n"


def test_a_request_that_would_wait_too_long_is_turned_away() -> None:
    with plain(max_wait_seconds=0.001, engine={"max_concurrent": 1}) as server:
        assert send(server, "plain").status == 200  # now the server knows how long answers take
        first = send(server, "endless", stream=True)
        refused = send(server, "plain")
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert json.loads(refused.read())["error"]["code"] == "overloaded"
        first.close()


def test_draining_lets_nobody_in_and_finishes_what_runs() -> None:
    with plain() as server:
        running_one = send(server, "endless", stream=True, sampling={"max_tokens": 500})
        server.service.draining = True
        refused = send(server, "plain")
        assert refused.status == 503 and refused.headers["retry-after"]
        assert events(running_one)[-2]["end"] == "length"


def test_without_a_model_yet_requests_are_told_to_come_back() -> None:
    with plain() as server:
        backend, server.service._backend = server.service._backend, None
        refused = send(server, "plain")
        assert refused.status == 503 and json.loads(refused.read())["error"]["code"] == "loading"
        server.service._backend = backend


def test_a_key_is_needed_as_soon_as_there_is_one(tmp_path: Path) -> None:
    accounts = Accounts(folder=tmp_path)
    with plain(accounts=accounts, data=tmp_path) as server:
        assert send(server, "plain").status == 200
        key, secret = accounts.keys.create("one")
        refused = send(server, "plain")
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert send(server, "plain", {"authorization": "Bearer sk-hadal-wrong"}).status == 401
        for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
            assert send(server, "plain", headers).status == 200
        assert [row["key"] for row in rows(server)] == [None, key.id, key.id]


def test_limits_of_a_key_are_told_by_status_and_time(tmp_path: Path) -> None:
    accounts = Accounts(folder=tmp_path)
    _, secret = accounts.keys.create("one", Limits(requests_per_minute=1))
    with plain(accounts=accounts, data=tmp_path) as server:
        assert send(server, "plain", {"x-api-key": secret}).status == 200
        refused = send(server, "plain", {"x-api-key": secret})
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 61


def test_an_answer_that_cannot_be_accounted_for_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with plain() as server:

        def lose(row: Any) -> Future[None]:
            future: Future[None] = Future()
            future.set_exception(AccountsError("the disk is full"))
            return future

        monkeypatch.setattr(server.service.accounts, "record", lose)
        *_, error, _ = events(send(server, "plain", stream=True))
        assert error["error"]["code"] == "ledger_unavailable"
        assert send(server, "plain").status == 503


def test_the_cost_is_told_to_those_who_ask() -> None:
    with plain() as server:
        silent, told = send(server, "plain"), send(server, "plain", {"x-hadal-cost": "usd"})
        assert silent.headers["x-hadal-cost"] is None and "cost" not in json.loads(silent.read())["usage"]
        cost = json.loads(told.read())["usage"]["cost"]
        assert told.headers["x-hadal-cost"] == f"{cost} USD" and float(cost) > 0
        assert float(cost) == pytest.approx(float(rows(server)[-1]["cost"]) / 1e12)
