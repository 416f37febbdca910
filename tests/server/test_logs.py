"""Logs and traces: a request's line and span hold figures and no text, in the form that was asked for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from hadal.accounts import Key
from hadal.server.logs import TraceError, configure_logs, log_visit, make_tracer, visit_fields
from hadal.server.visit import Caller, Visit
from hadal.server.wire import Usage

KEY = Key("key-1", "a name", "sk-hadal-abc", datetime(2026, 1, 1, tzinfo=UTC))


def visit(**changes: Any) -> Visit:
    made = Visit("chat", Caller(KEY), model="deepseek-chat", began=100.0, received=1_700_000_000.0)
    made.admitted, made.first_token, made.last_token, made.ended = 100.25, 101.0, 102.0, 102.5
    made.usage, made.cost, made.finish_reason, made.cache_reason = Usage(30, 10, 5, 2), Decimal("0.5"), "stop", "hit"
    made.user_id = "private-person"
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    kept = [(logger, logger.handlers, logger.propagate, logger.level) for logger in map(logging.getLogger, NAMES)]
    yield
    for logger, handlers, propagate, level in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


NAMES = ("hadal", "uvicorn", "uvicorn.error")


def test_a_request_is_one_json_object_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    log_visit(visit())
    told = json.loads(capsys.readouterr().err)
    assert told["logger"] == "hadal.requests" and told["level"] == "info" and told["time"].endswith("Z")
    assert (told["api"], told["status"], told["key"], told["model"]) == ("chat", 200, "key-1", "deepseek-chat")
    assert (told["prompt"], told["hit"], told["output"], told["reasoning"], told["cost_usd"]) == (30, 10, 5, 2, 0.5)
    assert (told["queue_s"], told["first_token_s"], told["total_s"]) == (0.25, 1.0, 2.5)


def test_text_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("text")
    log_visit(visit(status=500, error="engine_error"))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and " ERROR " in line and "chat status=500" in line and "error=engine_error" in line


def test_exceptions_are_told_within_the_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    try:
        raise RuntimeError("on purpose")
    except RuntimeError:
        logging.getLogger("hadal.server").exception("it failed")
    told = json.loads(capsys.readouterr().err)
    assert told["message"] == "it failed" and "RuntimeError: on purpose" in told["exception"]


def test_neither_secrets_nor_end_users_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    log_visit(visit())
    line = capsys.readouterr().err
    assert "sk-hadal" not in line and "private-person" not in line and "a name" not in line


def test_what_a_request_did_not_come_to_is_absent() -> None:
    told = visit_fields(visit(status=429, error="queue_full", usage=None, cost=None, admitted=None, first_token=None))
    assert told["error"] == "queue_full" and not told.keys() & {"prompt", "cost_usd", "queue_s", "first_token_s"}


def test_a_span_has_the_times_and_names_of_the_conventions() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    trace, shutdown = make_tracer(exporter)
    trace(visit(traceparent=f"00-{'a' * 32}-{'b' * 16}-01"))
    trace(visit(status=500, error="engine_error", usage=None))
    shutdown()
    good, bad = exporter.get_finished_spans()
    assert good.name == "chat deepseek-chat" and good.parent.span_id == int("b" * 16, 16)
    assert good.start_time == 1_700_000_000 * 10**9 and good.end_time - good.start_time == 2_500_000_000
    assert [(event.name, event.timestamp - good.start_time) for event in good.events] == [
        ("admitted", 250_000_000), ("first_token", 1_000_000_000),
    ]  # fmt: skip
    told = good.attributes
    assert told["gen_ai.usage.input_tokens"] == 30 and told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.response.finish_reasons"] == ("stop",) and told["gen_ai.operation.name"] == "chat"
    assert bad.status.status_code.name == "ERROR" and bad.attributes["error.type"] == "engine_error"
    assert bad.parent is None and good.resource.attributes["service.name"] == "hadal"


def test_missing_packages_are_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TraceError, match="install opentelemetry-sdk"):
        make_tracer()


def test_a_client_writes_no_line_and_no_field_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("text")
    log_visit(visit(model="claude-x\n2026-01-01 00:00:00 INFO    chat status=200 key=key-2"))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("20") and r" model='claude-x\n2026-01-01 00:00:00 INFO " in line
    assert " key=key-1 model='" in line
