"""Health: what probes are told while loading, ready, draining and without a ledger, and the figures of /status."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hadal.accounts import Accounts, AccountsError
from hadal.server import create_app, health
from hadal.server.backend import LocalBackend
from hadal.server.health import History, Startup
from hadal.server.settings import Settings
from tests.fakes import scripted_llm

SCRIPT: dict[str, str | None] = {"plain": "one. two. three."}


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return create_app(None, Settings(model="tiny", data=tmp_path), Accounts(folder=tmp_path))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as it:
        yield it


def probe(client: TestClient, path: str) -> tuple[int, str]:
    response = client.get(path)
    return response.status_code, response.json()["status"]


def test_until_the_model_is_there_the_server_lives_and_is_not_ready(app: FastAPI, client: TestClient) -> None:
    app.state.startup = Startup()
    app.state.startup.note("reading 3 files")
    assert probe(client, "/livez") == (200, "ok")
    assert probe(client, "/readyz") == probe(client, "/health") == probe(client, "/startupz") == (503, "loading")
    response = client.get("/startupz")
    told = response.json()
    assert response.headers["retry-after"] == "5" and told["elapsed_s"] >= told["stages"][0]["at_s"] >= 0
    assert told["stages"][0]["line"] == "reading 3 files"


def test_a_server_that_does_not_load_anything_has_no_stages(client: TestClient) -> None:
    assert client.get("/startupz").json() == {"status": "loading"}


def test_a_server_is_ready_until_it_drains_or_its_ledger_is_away(tmp_path: Path, monkeypatch: Any) -> None:
    backend = LocalBackend(scripted_llm(SCRIPT))
    app = create_app(backend, Settings(model="tiny", data=tmp_path), Accounts(folder=tmp_path))
    with TestClient(app) as client:
        assert probe(client, "/readyz") == (200, "ready") and probe(client, "/startupz") == (200, "started")
        with monkeypatch.context() as patch:
            patch.setattr(Accounts, "healthy", False)
            assert probe(client, "/readyz") == (503, "ledger") and probe(client, "/livez") == (200, "ok")
        app.state.service.draining = True
        assert probe(client, "/readyz") == (503, "draining") and probe(client, "/startupz") == (200, "started")


def test_probes_need_no_key_and_figures_do(app: FastAPI, client: TestClient) -> None:
    secret = app.state.service.accounts.keys.create("someone")[1]
    assert {client.get(path).status_code for path in ("/livez", "/readyz", "/startupz")} == {200, 503}
    assert client.get("/status").status_code == client.get("/metrics").status_code == 401
    headers = {"Authorization": f"Bearer {secret}"}
    assert client.get("/status", headers=headers).status_code == 200
    assert client.get("/metrics", headers=headers).status_code == 200


def test_status_has_what_the_page_draws(client: TestClient) -> None:
    told = client.get("/status").json()
    assert told["model"] == "tiny" and told["running"] == told["waiting"] == 0 and told["draft_acceptance"] is None
    assert told["cache"] == {"used_bytes": 0, "total_bytes": 0, "hit_rate": 0.0, "reasons": {}}
    assert told["spend"] == {
        "currency": "USD", "price_list": "flash-launch", "today": 0, "total": 0, "by_day": [],
    }  # fmt: skip
    assert set(told["history"][0]) >= {"t", "running", "waiting", "tokens_per_second", "hit_rate"}
    assert abs(told["started"] + told["uptime_s"] - time.time()) < 5 and told["version"]


def test_status_lacks_the_spend_while_the_ledger_cannot_be_read(client: TestClient, monkeypatch: Any) -> None:
    def away(*args: Any, **options: Any) -> None:
        raise AccountsError("the database is away")

    monkeypatch.setattr(Accounts, "usage", away)
    assert "spend" not in client.get("/status").json()


def test_a_figure_that_fails_once_does_not_end_the_sampling(app: FastAPI, monkeypatch: Any) -> None:
    def fail(service: Any) -> None:
        monkeypatch.setattr(health, "take_vitals", take_vitals)
        raise RuntimeError("on purpose")

    take_vitals = health.take_vitals
    monkeypatch.setattr(health, "take_vitals", fail)
    monkeypatch.setattr(health, "_SAMPLE_SECONDS", 0.01)
    with TestClient(app) as client:
        end = time.monotonic() + 10
        while not client.get("/status").json()["history"]:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_rates_are_those_since_the_last_sample(tmp_path: Path, monkeypatch: Any) -> None:
    llm = scripted_llm(SCRIPT)
    app = create_app(LocalBackend(llm), Settings(model="tiny", data=tmp_path), Accounts(folder=tmp_path))
    with TestClient(app):
        clock = [1000.0]
        monkeypatch.setattr("hadal.server.health.time.monotonic", lambda: clock[0])
        history = History(app.state.service)
        clock[0] += 5
        stats = llm.engine.stats
        stats.generated, stats.prefilled, stats.prompt_tokens, stats.cached_tokens = 100, 400, 1000, 600
        history.sample()
        clock[0] += 5
        stats.generated += 50
        history.sample()
        first, second = history._samples
        assert (first["tokens_per_second"], first["prefill_tokens_per_second"], first["hit_rate"]) == (20, 80, 0.6)
        assert (second["tokens_per_second"], second["hit_rate"]) == (10, 0.6)
