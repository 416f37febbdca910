"""Batches through OpenAI's own client: what comes of every line, and what happens when things end early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from openai.types import Batch

from hadal.accounts import Accounts, Limits
from hadal.server import runner
from tests.fakes import scripted_llm
from tests.server.conftest import Running, running
from tests.server.test_files import connect, wait_until

CHAT = "/v1/chat/completions"
MESSAGES = {
    "model": "scripted",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "cat"}],
    "thinking": {"type": "disabled"},
}
SCRIPT: dict[str, str | None] = {"cat": "meow", "dog": "woof woof", "broken": None, "long": "one. two. three. " * 4}


def request(name: str, text: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    body = {"model": "scripted", "messages": messages, "thinking": {"type": "disabled"}, "max_tokens": 900} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def begin(client: openai.OpenAI, *lines: Any, endpoint: Any = CHAT, **options: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


def ended(client: openai.OpenAI, id: str, seconds: float = 30.0) -> Batch:
    open_states = ("validating", "in_progress", "finalizing", "cancelling")
    wait_until(lambda: client.batches.retrieve(id).status not in open_states, seconds)
    return client.batches.retrieve(id)


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).read().splitlines()]
    by_name = {line["custom_id"]: line for line in lines}
    assert len(by_name) == len(lines), "a line is there twice"
    return by_name


def rows(folder: Path) -> list[Any]:
    engine = sa.create_engine(f"sqlite:///{folder / 'hadal.db'}")
    with engine.connect() as connection:
        return list(connection.execute(sa.text("select * from ledger")))


@contextmanager
def serving(folder: Path, script: dict[str, str | None] = SCRIPT, **options: Any) -> Iterator[Running]:
    settings = {
        name: options.pop(name) for name in ("accounts", "start_seconds", "file_limit", "body_limit") if name in options
    }
    if "accounts" not in settings:
        settings["accounts"] = Accounts(folder=folder)
    with running(scripted_llm(script, **{"max_concurrent": 4} | options), data=folder, **settings) as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(runner, "_PAUSE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return connect(server)


def test_answers_and_errors_come_in_files_of_their_own(client: openai.OpenAI, folder: Path) -> None:
    before = len(rows(folder))
    lines = [
        request("one", "a cat"), request("two", "a dog", n=2), request("three", "a cat", model="gpt-9"),
        request("four", "a cat", temperature="hot"), request("five", "a cat", stream=True), request("six", "broken"),
    ]  # fmt: skip
    made = begin(
        client, *lines, metadata={"owner": "me"}, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.status == "validating" and made.expires_at == made.created_at + 24 * 3600
    assert made.object == "batch" and made.completion_window == "24h" and made.metadata == {"owner": "me"}
    done = ended(client, made.id)
    assert done.status == "completed" and done.errors is None and done.completed_at and done.in_progress_at
    counts = done.request_counts
    assert counts and (counts.total, counts.completed, counts.failed) == (6, 2, 4)
    good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
    assert set(good) == {"one", "two"} and set(bad) == {"three", "four", "five", "six"}
    one = good["one"]
    assert one["error"] is None and one["response"]["status_code"] == 200 and one["id"].startswith("batch_req_")
    body = one["response"]["body"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["content"] == "meow"
    assert body["usage"]["completion_tokens"] > 0
    assert [c["message"]["content"] for c in good["two"]["response"]["body"]["choices"]] == ["woof woof"] * 2
    statuses = {name: line["response"]["status_code"] for name, line in bad.items()}
    assert statuses == {"three": 400, "four": 422, "five": 422, "six": 500}
    assert bad["four"]["response"]["body"]["error"]["param"] == "temperature"
    used = done.usage
    assert used and used.output_tokens >= body["usage"]["completion_tokens"] and used.input_tokens > 0
    assert used.total_tokens == used.input_tokens + used.output_tokens
    file = client.files.retrieve(done.output_file_id or "")
    assert file.purpose == "batch_output" and file.expires_at == file.created_at + 3600
    written = [row for row in rows(folder)[before:] if row.status == 200]
    assert len(written) == 2 and {row.batch for row in written} == {made.id}
    assert {row.api for row in written} == {"batch"} and {row.priority for row in written} == {runner.BACKGROUND}
    assert {row.id for row in written} == {line["response"]["request_id"] for line in good.values()}


@pytest.mark.parametrize(
    ("endpoint", "body", "text"),
    [
        ("/v1/completions", {"model": "scripted", "prompt": "cat"}, ["choices", 0, "text"]),
        ("/v1/responses", {"model": "scripted", "input": "cat"}, ["object"]),
        ("/anthropic/v1/messages", MESSAGES, ["content", 0, "text"]),
        ("/v1/messages", MESSAGES, ["content", 0, "text"]),
    ],
)
def test_other_apis_have_batches_too(client: openai.OpenAI, endpoint: str, body: Any, text: list[Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    wrong = line | {"custom_id": "b", "body": {"model": "scripted"}}
    done = ended(client, begin(client, line, wrong, endpoint=endpoint).id)
    error = read(client, done.error_file_id)["b"]["response"]["body"]
    assert ("type" in error) == ("messages" in endpoint) and "missing" in error["error"]["message"]
    found = read(client, done.output_file_id)["a"]["response"]["body"]
    for step in text:
        found = found[step]
    assert found in ("meow", "response")


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        ([], {None: "empty_file"}),
        ([b"", b"  "], {None: "empty_file"}),
        ([request("a", "cat"), b"{not json"], {2: "invalid_json_line"}),
        ([request("a", "cat"), b"", b"\xff\xfe"], {3: "invalid_json_line"}),
        ([b"[" * 100_000], {1: "invalid_json_line"}),
        ([request("a", "cat"), request("b", "cat"), request("a", "dog")], {3: "duplicate_custom_id"}),
        ([{k: v for k, v in request("a", "cat").items() if k != "body"}], {1: "missing_required_parameter"}),
        ([request("a", "cat") | {"color": "red"}, request("b", "cat") | {"method": "GET"}],
         {1: "unknown_parameter", 2: "invalid_request_error"}),
        ([request("a", "cat", url="/v1/completions"), request("", "cat")],
         {1: "url_mismatch", 2: "invalid_request_error"}),
        ([b"7", b"null", b'"x"'], dict.fromkeys((1, 2, 3), "invalid_request_error")),
    ],
)  # fmt: skip
def test_a_file_with_wrong_lines_fails_before_anything_runs(
    client: openai.OpenAI, lines: list[Any], codes: dict[int | None, str]
) -> None:
    done = ended(client, begin(client, *lines).id)
    assert done.status == "failed" and done.failed_at and done.output_file_id is None
    assert done.errors and {e.line: e.code for e in done.errors.data or []} == codes
    assert all(e.message for e in done.errors.data or [])


def test_wrong_batches_are_refused(client: openai.OpenAI) -> None:
    data = client.files.create(file=("in", b"{}"), purpose="user_data").id
    given = {"input_file_id": data, "endpoint": CHAT, "completion_window": "24h"}
    wrong: list[tuple[dict[str, Any], type[openai.APIStatusError]]] = [
        ({}, openai.BadRequestError),
        ({"input_file_id": "file-none"}, openai.NotFoundError),
        ({"endpoint": "/v1/embeddings"}, openai.UnprocessableEntityError),
        ({"completion_window": "1h"}, openai.UnprocessableEntityError),
        ({"metadata": {"k" * 65: "v"}}, openai.UnprocessableEntityError),
        ({"metadata": {str(i): "v" for i in range(17)}}, openai.UnprocessableEntityError),
        ({"extra_body": {"color": "red"}}, openai.UnprocessableEntityError),
    ]
    for change, error in wrong:
        with pytest.raises(error):
            client.batches.create(**(given | change))
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError):
        client.batches.cancel("batch_none")


def test_lists_have_pages(client: openai.OpenAI) -> None:
    ids = [begin(client, request("a", "cat")).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [b.id for b in page.data] == ids[:0:-1] and page.has_more
    assert next(b.id for b in client.batches.list(limit=2, after=ids[1]).data) == ids[0]
    for id in ids:
        assert ended(client, id).status == "completed"
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.with_raw_response.cancel(ids[0])


def test_a_cancelled_batch_keeps_what_is_done(tmp_path: Path) -> None:
    with serving(tmp_path, context=200_000, max_concurrent=2) as server:
        client = connect(server)
        lines = [request("done", "cat")] + [request(f"{i}", "endless", max_tokens=100_000) for i in range(20)]
        made = begin(client, *lines)
        wait_until(lambda: counted(client, made.id) >= 1)
        with pytest.raises(openai.ConflictError):  # its input is in use
            client.files.delete(made.input_file_id)
        assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
        done = ended(client, made.id)
        assert done.status == "cancelled" and done.cancelling_at and done.cancelled_at
        assert set(read(client, done.output_file_id)) == {"done"}
        bad = read(client, done.error_file_id)
        assert len(bad) == 20 and all(b["error"]["code"] == "batch_cancelled" for b in bad.values())
        wait_until(lambda: server.active() == 0)
        client.files.delete(made.input_file_id)


def counted(client: openai.OpenAI, id: str) -> int:
    counts = client.batches.retrieve(id).request_counts
    return counts.completed if counts else 0


def test_what_has_not_run_in_time_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hadal.server.batches.WINDOW_SECONDS", 2)
    with serving(tmp_path, context=200_000, max_concurrent=2) as server:
        client = connect(server)
        slow = [request(f"{i}", "endless", max_tokens=100_000) for i in range(5)]
        done = ended(client, begin(client, request("done", "cat"), *slow).id)
        assert done.status == "expired" and done.expired_at and done.expires_at
        assert done.expires_at <= done.expired_at <= done.expires_at + 2
        assert set(read(client, done.output_file_id)) == {"done"}
        assert {e["error"]["code"] for e in read(client, done.error_file_id).values()} == {"batch_expired"}
        counts = done.request_counts
        assert counts and counts.completed == 1 and counts.failed == 5 and counts.total == 6


def test_who_waits_for_an_answer_goes_before_every_line(tmp_path: Path) -> None:
    with serving(tmp_path, max_concurrent=1) as server:
        client = connect(server)
        made = begin(client, *(request(f"{i}", "long") for i in range(60)))
        wait_until(lambda: server.active() > 0)
        for _ in range(3):
            assert say(client, "a cat") == "meow"
        left = client.batches.retrieve(made.id)
        assert left.status == "in_progress" and counted(client, made.id) <= 30
        assert ended(client, made.id, 60).status == "completed"


def say(client: openai.OpenAI, text: str) -> str | None:
    messages: Any = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(
        model="scripted", messages=messages, extra_body={"thinking": {"type": "disabled"}}
    )
    return answer.choices[0].message.content


@contextmanager
def with_key(folder: Path, limits: Limits, **options: Any) -> Iterator[tuple[Running, openai.OpenAI, Accounts]]:
    with Accounts(folder=folder) as accounts:
        secret = accounts.keys.create("ann", limits)[1]
        with serving(folder, accounts=accounts, **options) as server:
            yield server, connect(server, secret), accounts


def test_limits_of_the_key_make_a_batch_wait(tmp_path: Path) -> None:
    with with_key(tmp_path, Limits(concurrent=1)) as (_, client, _accounts):
        done = ended(client, begin(client, *(request(f"{i}", "cat") for i in range(5))).id)
        assert done.request_counts and done.request_counts.completed == 5
        assert len(rows(tmp_path)) == 5 and {row.key for row in rows(tmp_path)} != {None}


def test_an_empty_budget_ends_a_batch_and_keeps_what_is_done(tmp_path: Path) -> None:
    with with_key(tmp_path, Limits(tokens=400)) as (_, client, _accounts):
        lines = [request(f"{i}", "cat", max_tokens=100) for i in range(40)]
        done = ended(client, begin(client, *lines).id)
        assert done.status == "failed" and done.errors and (done.errors.data or [])[0].code == "insufficient_balance"
        good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
        assert 0 < len(good) < 40 and len(good) + len(bad) == 40
        assert len([row for row in rows(tmp_path) if row.status == 200]) == len(good)
        assert {e["error"]["code"] for e in bad.values()} == {"insufficient_balance"}


def test_a_revoked_key_ends_its_batches(tmp_path: Path) -> None:
    with with_key(tmp_path, Limits(), context=200_000) as (server, client, accounts):
        begin(client, *(request(f"{i}", "endless", max_tokens=100_000) for i in range(9)))
        wait_until(lambda: server.active() > 0)
        accounts.keys.revoke("ann")
        wait_until(lambda: server.active() == 0)
        wait_until(lambda: ended_in(tmp_path) == ["failed"])


def ended_in(folder: Path) -> list[str]:
    engine = sa.create_engine(f"sqlite:///{folder / 'hadal.db'}")
    with engine.connect() as connection:
        return list(connection.execute(sa.text("select status from batches")).scalars())


def test_keys_see_their_own_batches_and_take_turns(tmp_path: Path) -> None:
    with Accounts(folder=tmp_path) as accounts:
        secrets = [accounts.keys.create(name)[1] for name in ("ann", "bob")]
        with serving(tmp_path, accounts=accounts, max_concurrent=1) as server:
            ann, bob = (connect(server, secret) for secret in secrets)
            big = begin(ann, *(request(f"{i}", "long") for i in range(30)))
            small = begin(bob, request("a", "cat"))
            assert ended(bob, small.id).status == "completed"
            assert ann.batches.retrieve(big.id).status == "in_progress"
            for attempt in (bob.batches.retrieve, bob.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    attempt(big.id)
            assert [b.id for b in bob.batches.list()] == [small.id]
            ann.batches.cancel(big.id)
            assert ended(ann, big.id).status == "cancelled"
