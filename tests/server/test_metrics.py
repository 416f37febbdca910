"""Metrics: what a scrape says about visits that ended and about a server that answered."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hadal.accounts import Accounts
from hadal.server.metrics import Metrics, take_vitals
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.visit import Caller, Visit
from hadal.server.wire import Usage
from tests.server.conftest import Running

SHARED = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "prompt_tokens",
    "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
    "prompt_tokens_by_source", "iteration_tokens_total", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_prefill_kv_computed_tokens", "request_success",
    "spec_decode_num_drafts", "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos",
    "corrupted_requests", "admission_rejections",
]  # fmt: skip


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Accounts(folder=tmp_path) as accounts:
        yield Service(Settings(model="tiny"), accounts)


def visit(**changes: Any) -> Visit:
    """A request that waited 1 s, was read in 2 s and wrote five tokens in 4 s."""
    made = Visit("chat", Caller(), began=100.0, admitted=101.0, first_token=103.0, last_token=107.0, ended=107.5)
    made.usage, made.cost, made.finish_reason = Usage(1000, 600, 5, 0), Decimal("0.25"), "stop"
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def values(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels besides the model's name, as `name{a=b}`."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels.get("model_name", "tiny") == "tiny"
            shown = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            found[f"{sample.name}{{{shown}}}" if shown else sample.name] = sample.value
    return found


def test_every_name_of_vllm_is_there_beside_our_own_with_the_same_type(service: Service) -> None:
    families = {f.name: f.type for f in text_string_to_metric_families(Metrics(service).render().decode())}
    for name in SHARED:
        plain = name.removesuffix("_total") if name != "iteration_tokens_total" else name
        assert families[f"vllm:{plain}"] == families[f"hadal_{plain}"]
    assert families["vllm:prompt_tokens"] == "counter" and families["vllm:num_requests_running"] == "gauge"
    assert families["vllm:iteration_tokens_total"] == families["vllm:inter_token_latency_seconds"] == "histogram"


def test_a_visit_is_told_in_times_and_tokens(service: Service) -> None:
    metrics = Metrics(service)
    metrics.observe(visit())
    metrics.observe(visit(finish_reason="tool_calls"))
    found = values(metrics)
    sums = {
        "time_to_first_token": 3, "e2e_request_latency": 7.5, "request_queue_time": 1, "request_prefill_time": 2,
        "request_decode_time": 4, "request_inference_time": 6, "request_time_per_output_token": 1,
    }  # fmt: skip
    for name, seconds in sums.items():
        assert found[f"vllm:{name}_seconds_sum"] == found[f"hadal_{name}_seconds_sum"] == pytest.approx(2 * seconds)
        assert found[f"vllm:{name}_seconds_count"] == 2
    assert found["vllm:time_to_first_token_seconds_bucket{le=2.5}"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket{le=5}"] == 2
    assert found["vllm:request_prefill_kv_computed_tokens_sum"] == 800
    assert found["vllm:request_success_total{finished_reason=stop}"] == 2
    assert found["hadal_cost_usd_total"] == 0.5


def test_gaps_are_shared_by_tokens_that_came_together(service: Service) -> None:
    metrics = Metrics(service)
    metrics.observe_gap(0.4, 4)
    found = values(metrics)
    assert found["vllm:inter_token_latency_seconds_count"] == 4
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.4)
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.1}"] == 4


def test_requests_that_were_turned_away_have_no_times(service: Service) -> None:
    metrics = Metrics(service)
    empty = {"usage": None, "cost": None, "finish_reason": "", "first_token": None, "admitted": None}
    metrics.observe(visit(**empty, status=429, error="queue_full"))
    metrics.observe(visit(**empty, status=400, error="invalid_request_error"))
    metrics.observe(visit(status=500, error="engine_error", finish_reason="error"))
    found = values(metrics)
    assert found["vllm:admission_rejections_total{reason=queue_full}"] == 1
    assert "vllm:admission_rejections_total{reason=invalid_request_error}" not in found
    assert found["hadal_requests_total{api=chat,status=400}"] == 1
    assert found["vllm:time_to_first_token_seconds_count"] == found["vllm:corrupted_requests_total"] == 1


def test_a_cache_that_never_hits_is_told_once_in_a_while(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(service)
    missed = visit(turns=2, usage=Usage(1000, 0, 5, 0), cache_reason="no_common_prefix")
    for _ in range(49):
        metrics.observe(missed)
    metrics.observe(visit(turns=2, cache_reason="hit"))
    for _ in range(49):
        metrics.observe(missed)
        metrics.observe(visit(turns=0, usage=Usage(1000, 0, 5, 0)))
    assert not caplog.text
    metrics.observe(missed)
    assert "found nothing for 50 conversations in a row ('no_common_prefix' 50 times)" in caplog.text
    assert len(caplog.records) == 1


def test_a_server_without_a_model_is_scraped_as_well(service: Service) -> None:
    assert take_vitals(service).running == 0
    assert values(Metrics(service))["hadal_loaded"] == 0


def test_a_server_tells_what_its_engine_did(server: Running) -> None:
    body = {"model": server.llm.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    status, made = server.call("/v1/chat/completions", body)
    assert status == 200
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=")
        families = list(text_string_to_metric_families(response.read().decode()))
    found = {s.name: s.value for f in families for s in f.samples}
    usage = made["usage"]
    assert found["vllm:prompt_tokens_total"] >= usage["prompt_tokens"]
    assert found["vllm:generation_tokens_total"] >= usage["completion_tokens"]
    assert found["hadal_loaded"] == found["hadal_ledger_healthy"] == 1
    assert found["vllm:kv_cache_usage_perc"] <= 1 and found["process_resident_memory_bytes"] > 1e6
