"""Requests that schemathesis makes from our own OpenAPI document: whatever is sent, the server does not fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.fakes import scripted_llm
from tests.server.conftest import Running, running

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = int(os.environ.get("HADAL_EXAMPLES", "5"))  # per operation
EXPECTED = (503, 507)  # times set below run out; a disk may be full


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted_llm({"a": "yes"}, max_concurrent=8), request_seconds=0.5) as it:
        yield it


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_server_fail(server: Running, mode: str) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @given(strategy)
        @settings(
            max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        def check(case: Any) -> None:
            response = case.call(base_url=server.url, timeout=30)
            said = f"{case.as_curl_command()}\n{response.text}"
            assert response.status_code < 500 or response.status_code in EXPECTED, said
            if response.status_code >= 400 and response.content:
                assert "error" in json.loads(response.content), said

        try:
            check()
        except Unsatisfiable:
            assert mode == "negative", operation.label  # an operation without parameters can only be called rightly
