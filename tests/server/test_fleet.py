"""Two replicas under Ray Serve on this machine: where prompts go, what a dying or replaced replica does to answers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hadal.accounts import Accounts
from hadal.llm import LLM
from hadal.server.remote import RemoteBackend
from tests.accounts.conftest import postgresql  # noqa: F401
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.conftest import Running, running
from tests.server.test_upstream import SCRIPT, TOOL, chat, events, same, send, stream, until

pytestmark = pytest.mark.slow


def make(number: int) -> LLM:
    """A model that knows in which process it runs."""
    return scripted_llm(SCRIPT | {"who": f"{os.getpid()}."}, context=100_000, max_concurrent=4)


@pytest.fixture(scope="module")
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """PostgreSQL where it is installed."""
    try:
        url: str = request.getfixturevalue("postgresql").create("fleet")
    except pytest.skip.Exception:
        url = f"sqlite:///{tmp_path_factory.mktemp('data') / 'hadal.db'}"
    return url


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Running]:
    module = pytest.importorskip("hadal.server.fleet", reason="Ray Serve is not installed")
    folder = tmp_path_factory.mktemp("small")
    small_tokenizer().save(folder)
    fleet = module.Fleet(make, replicas=2, max_concurrent=4)
    backend = RemoteBackend(fleet, folder)
    with running(backend, model="scripted", accounts=Accounts(database, folder=folder)) as server:
        yield server


def who(server: Running, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """Which replica answers, and the answer."""
    status, answer = server.call("/v1/chat/completions", chat(f"{text} who", **more))
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer


def both(server: Running) -> set[str]:
    """The replicas that answer now."""
    return {who(server, f"{i} {time.time()}")[0] for i in range(8)}


def test_turns_of_a_conversation_go_where_its_beginning_is_kept(front: Running) -> None:
    homes = []
    for i in range(6):
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"{i}{i} conversation " * 20 + "who"}]
        places, hits = [], []
        for turn in range(3):
            place, answer = who(front, "", messages=messages)
            places.append(place)
            hits.append(answer["usage"]["prompt_cache_hit_tokens"] / answer["usage"]["prompt_tokens"])
            messages += [answer["choices"][0]["message"], {"role": "user", "content": f"turn {turn}, who"}]
        assert len(set(places)) == 1 and min(hits[1:]) > 0.8, (places, hits)
        homes.append(places[0])
    assert set(Counter(homes).values()) == {3}


def test_unrelated_prompts_spread(front: Running) -> None:
    places = Counter(who(front, f"{i} unrelated " * 9)[0] for i in range(12))
    assert len(places) == 2 and min(places.values()) >= 5


def test_a_favourite_that_is_busy_is_passed_by(front: Running) -> None:
    home, _ = who(front, "popular " * 40)
    held = [stream(front, chat("popular " * 40 + "endless", max_tokens=90_000)) for _ in range(3)]
    for response in held:
        response.read(3000)
    places = {who(front, "popular " * 40)[0] for _ in range(3)}
    for response in held:
        response.close()
    until(lambda: front.active() == 0)
    assert places != {home}


@pytest.mark.parametrize(
    "body",
    [
        chat("ponder", thinking={"type": "enabled"}, logprobs=True, top_logprobs=2),
        chat("use it", tools=[TOOL]),
        chat("ponder", thinking={"type": "enabled"}, tools=[TOOL], tool_choice="required", max_tokens=60),
        chat("<dice>", temperature=1, seed=5, n=3, max_tokens=9, logprobs=True),
        chat("<dice>", temperature=1, seed=5, response_format={"type": "json_object"}, max_tokens=40),
        chat("plain", stop=["two"]),
        {"prompt": ["plain ", [9, 8, 7]], "prompt_logprobs": 1, "n": 2, "temperature": 0, "max_tokens": 5},
    ],
)
def test_answers_are_those_of_one_engine_alone(front: Running, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with running(scripted_llm(SCRIPT, context=100_000, max_concurrent=4)) as direct:
        wanted = direct.call(path, body | {"model": "scripted"})
    found = front.call(path, body | {"model": "scripted"})
    assert wanted[0] == found[0] == 200
    for _, answer in (wanted, found):
        answer["usage"] = answer["usage"]["completion_tokens"]
    assert same(found[1]) == same(wanted[1])


def test_clients_that_leave_free_the_replicas(front: Running) -> None:
    held = [stream(front, chat(f"{i} endless", max_tokens=90_000)) for i in range(8)]
    for response in held:
        response.read(3000)
        response.close()
    until(lambda: front.active() == 0)
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: who(front, f"{i} afterwards"), range(8)))
    assert time.monotonic() - began < 10


def test_a_replica_that_dies_takes_only_the_answers_it_had_begun(front: Running) -> None:
    home, _ = who(front, "fragile " * 40)
    held = stream(front, chat("fragile " * 40 + "endless", max_tokens=90_000))
    held.read(3000)
    os.kill(int(home.rstrip(".")), signal.SIGKILL)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: who(front, "fragile " * 40 + str(i))[0], range(8)))
    assert home not in found
    assert events(held)[-1]["error"]["code"] == "upstream_unavailable"
    until(lambda: len(both(front) - {home}) == 2, 60)


def test_a_rolling_restart_under_load_fails_no_request_and_each_has_its_row(front: Running, database: str) -> None:
    before, over = both(front), threading.Event()
    answers: list[str] = []
    fleet: Any = front.service.backend._source  # type: ignore[attr-defined]

    def client(number: int) -> int:
        asked = 0
        while not over.is_set():
            asked += 1
            response = send(front, chat(f"client {number} asks {asked}: who", stream=asked % 2 == 0))
            raw = response.read().decode()
            assert response.status == 200, raw
            if asked % 2:
                answers.append(json.loads(raw)["choices"][0]["message"]["content"])
            else:
                deltas = [json.loads(line[6:]) for line in raw.split("\n") if line[:7] == "data: {"]
                assert "error" not in deltas[-1], deltas[-1]
                answers.append("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in deltas))
        return asked

    rows = count_rows(database)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        time.sleep(0.5)
        fleet.roll()
        time.sleep(0.5)
        over.set()
        asked = sum(found.result() for found in clients)
    until(lambda: count_rows(database) == rows + asked, 10)
    assert len(answers) == asked and set(answers) > before and not both(front) & before
    print(f"{asked} requests of 4 clients across a rolling restart, in {database.split(':')[0]}")


def count_rows(database: str) -> int:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        rows: int = connection.execute(sa.text("select count(*) from ledger")).scalar_one()
    engine.dispose()
    return rows


def test_replicas_of_a_machine_divide_its_memory_and_the_folder_for_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = pytest.importorskip("hadal.server.fleet", reason="Ray Serve is not installed")
    made: list[Any] = []
    monkeypatch.setattr(fleet, "LLM", lambda model, **options: made.append((model, options)))
    monkeypatch.setattr(fleet.devices, "memory_available", lambda device: 1200)
    fleet.LoadReplica("nano", {"prefix_folder": tmp_path, "device": "cpu"}, 3)(1)
    fleet.LoadReplica("nano", {"prefix_folder": None, "cache_memory": 7}, 3)(1)
    assert made == [
        ("nano", {"prefix_folder": tmp_path / "replica-1", "device": "cpu", "cache_memory": 200}),
        ("nano", {"prefix_folder": None, "cache_memory": 7}),
    ]
