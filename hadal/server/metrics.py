"""Metrics for Prometheus: what visits and the engine bring, under Hadal's names and, where it has them, vLLM's."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from hadal.engine import EngineStats
from hadal.server.backend import LocalBackend
from hadal.server.service import Service
from hadal.server.visit import Visit

_SECONDS = tuple(10.0**power * step for power in range(-3, 4) for step in (1, 2.5, 5))
_TOKENS = tuple(float(4**power) for power in range(0, 11))
_SAMPLE_VISITS = 50  # that went by without one hit before it is told
_SAMPLE_TOKENS = 256  # of a prompt that could have had one
_log = logging.getLogger("hadal.server")

_Kind = Literal["gauge", "counter"]
_Labels = tuple[tuple[str, str], ...]
_Values = Mapping[_Labels, float]
_Row = tuple[_Kind, str, str, float | _Values]


@dataclass(frozen=True)
class Vitals:
    """What the model does now and did since it began; zeros while there is none. Sizes are in bytes."""

    running: int = 0
    waiting: int = 0
    wait_seconds: float = 0.0
    max_concurrent: int = 0
    cache_used: int = 0
    cache_total: int = 0
    pages: int = 0
    page_tokens: int = 0
    store: Mapping[str, int] = field(default_factory=dict)
    stats: EngineStats = field(default_factory=EngineStats)


def take_vitals(service: Service) -> Vitals:
    """The vitals of now; an upstream tells of its queue alone."""
    if not service.loaded:
        return Vitals()
    backend = service.backend
    load = backend.load
    if not isinstance(backend, LocalBackend):
        return Vitals(load.running, load.waiting, load.wait)
    engine = backend.llm.engine
    plan, store = engine.plan, engine.store
    homes = plan.home * engine.running + (store.home_bytes if store else 0)
    return Vitals(
        running=load.running, waiting=load.waiting, wait_seconds=load.wait,
        max_concurrent=engine.options.max_concurrent, cache_used=engine.pages_in_use * plan.page + homes,
        cache_total=plan.cache, pages=plan.pages, page_tokens=plan.tokens // plan.pages,
        store=store.stats() if store else {}, stats=engine.stats,
    )  # fmt: skip


class _Histogram:
    """Counts by upper bound; one thread writes."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))


class Metrics:
    """Observes visits, and tells Prometheus of them and of the engine when it asks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._requests: Counter[_Labels] = Counter()
        self._rejections: Counter[_Labels] = Counter()
        self._finished: Counter[_Labels] = Counter()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._without_hit: Counter[str] = Counter()
        seconds = (
            "time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency",
            "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time",
        )  # fmt: skip
        tokens = ("request_prompt_tokens", "request_generation_tokens", "request_prefill_kv_computed_tokens")
        self._histograms = {f"{name}_seconds": _Histogram(_SECONDS) for name in seconds}
        self._histograms |= {name: _Histogram(_TOKENS) for name in tokens}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        service.observers.append(self.observe)
        service.on_gap = self.observe_gap

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def observe_gap(self, seconds: float, tokens: int) -> None:
        """Tokens that came together came evenly, as far as anyone can tell."""
        self._histograms["inter_token_latency_seconds"].add(seconds / tokens, tokens)

    def observe(self, visit: Visit) -> None:
        """Count a visit that has ended."""
        self._requests[("api", visit.api), ("status", str(visit.status))] += 1
        if visit.status in (402, 429, 503) and visit.usage is None:
            self._rejections[(("reason", visit.error or ""),)] += 1
        if visit.finish_reason:
            # To vLLM a call of tools is a stop.
            reason = "stop" if visit.finish_reason == "tool_calls" else visit.finish_reason
            self._finished[(("finished_reason", reason),)] += 1
        self._sums["corrupted_requests"] += visit.status == 500
        self._sums["malformed_tool_calls"] += visit.malformed
        self._sums["cost_usd"] += float(visit.cost or 0)
        self._observe_times(visit)
        if visit.usage is not None:
            usage = visit.usage
            self._add("request_prompt_tokens", usage.prompt)
            self._add("request_generation_tokens", usage.output)
            self._add("request_prefill_kv_computed_tokens", usage.prompt - usage.hit)
            if visit.turns and usage.prompt >= _SAMPLE_TOKENS:
                self._watch_hits(usage.hit, visit.cache_reason)

    def _observe_times(self, visit: Visit) -> None:
        first, last = visit.first_token, visit.last_token
        if first is None or visit.ended is None:
            return
        last = first if last is None else last
        self._add("time_to_first_token_seconds", first - visit.began)
        self._add("e2e_request_latency_seconds", visit.ended - visit.began)
        self._add("request_decode_time_seconds", last - first)
        if visit.usage is not None and visit.usage.output > 1:
            self._add("request_time_per_output_token_seconds", (last - first) / (visit.usage.output - 1))
        if visit.admitted is not None:
            self._add("request_queue_time_seconds", visit.admitted - visit.began)
            self._add("request_prefill_time_seconds", first - visit.admitted)
            self._add("request_inference_time_seconds", last - visit.admitted)

    def _add(self, name: str, value: float) -> None:
        self._histograms[name].add(value)

    def _watch_hits(self, hit: int, reason: str) -> None:
        """A cache that never hits looks like a slow server only; so it is told."""
        self._without_hit[reason] += 1
        if hit:
            self._without_hit.clear()
        elif self._without_hit.total() >= _SAMPLE_VISITS:
            most, times = self._without_hit.most_common(1)[0]
            _log.warning(
                "the prefix cache found nothing for %d conversations in a row (%r %d times); see docs/serving.md",
                _SAMPLE_VISITS, most or "unknown", times,
            )  # fmt: skip
            self._without_hit.clear()

    def collect(self) -> Iterator[Metric]:
        """All families; those that vLLM has, too, come twice."""
        now = take_vitals(self._service)
        for kind, name, text, values in self._shared(now):
            yield from (self._family(prefix, kind, name, text, values) for prefix in ("hadal_", "vllm:"))
        for name, histogram in self._histograms.items():
            yield from self._histogram(
                name, f"{name.replace('_', ' ').capitalize()}.", histogram.buckets(), histogram.sum
            )
        steps: list[tuple[str, float]] = [("+Inf", now.stats.steps)]
        text = "Tokens in a step; of their distribution the mean is known."
        yield from self._histogram("iteration_tokens_total", text, steps, now.stats.rows)
        for kind, name, text, values in self._own(now):
            yield self._family("hadal_", kind, name, text, values)

    def _shared(self, now: Vitals) -> list[_Row]:
        stats = now.stats
        config = {"block_size": now.page_tokens, "num_gpu_blocks": now.pages, "cache_bytes": now.cache_total}
        used = now.cache_used / now.cache_total if now.cache_total else 0.0
        sources = {"local_compute": stats.prompt_tokens - stats.cached_tokens, "local_cache_hit": stats.cached_tokens}
        return [
            ("gauge", "num_requests_running", "Answers that are being computed.", now.running),
            ("gauge", "num_requests_waiting", "Answers that wait for a place.", now.waiting),
            ("gauge", "kv_cache_usage_perc", "Share of the memory for states that is in use, 0 to 1.", used),
            ("gauge", "cache_config_info", "How memory for states is divided.", {_labels(config): 1}),
            ("counter", "prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("counter", "prompt_tokens_by_source", "The same, computed or found.", _by("source", sources)),
            ("counter", "generation_tokens", "Tokens generated.", stats.generated),
            ("counter", "prefix_cache_queries", "Prompt tokens looked up.", stats.prompt_tokens),
            ("counter", "prefix_cache_hits", "Prompt tokens found.", stats.cached_tokens),
            ("counter", "num_preemptions", "Requests that lost their state for a while.", stats.preemptions),
            ("counter", "spec_decode_num_drafts", "Rows of guesses verified.", stats.verified),
            ("counter", "spec_decode_num_draft_tokens", "Tokens guessed.", stats.drafted),
            ("counter", "spec_decode_num_accepted_tokens", "Guesses that stood.", stats.accepted),
            ("counter", "spec_decode_num_accepted_tokens_per_pos", "The same by place.",
             _by("position", stats.accepted_at.copy())),
            ("counter", "request_success", "Answers that ended, by reason.", self._finished),
            ("counter", "admission_rejections", "Requests turned away, by code.", self._rejections),
            ("counter", "corrupted_requests", "Requests that the engine failed on.", self._sums["corrupted_requests"]),
        ]  # fmt: skip

    def _own(self, now: Vitals) -> list[_Row]:
        service, stats, memory = self._service, now.stats, self._service.memory
        turns = {"replayed": memory.replayed, "repaired": memory.repaired, "unknown": memory.unknown}
        return [
            ("counter", "requests", "Requests that ended, by API and status.", self._requests),
            ("gauge", "requests_under_way", "Requests that were let in and have not ended.", len(service.seats)),
            ("gauge", "predicted_wait_seconds", "What a new request may expect.", now.wait_seconds),
            ("counter", "prefix_cache_lookups", "Look-ups: hit, or why none.", _by("reason", stats.cache.copy())),
            ("gauge", "prefix_store", "Counts and sizes of kept prefixes.", _by("item", now.store)),
            ("counter", "malformed_tool_calls", "Tool calls that came back as text.",
             self._sums["malformed_tool_calls"]),
            ("counter", "history_turns", "Earlier answers that clients sent back.", _by("outcome", turns)),
            ("gauge", "turn_memory_bytes", "Size of the answers that are remembered.", memory.nbytes),
            ("counter", "integrity_faults", "Mistakes found in the books of states.", stats.faults),
            ("counter", "cost_usd", "Costs at the price list in use.", self._sums["cost_usd"]),
            ("gauge", "ledger_healthy", "1 while rows can be made safe.", float(service.accounts.healthy)),
            ("gauge", "loaded", "1 when there is a model to answer.", float(service.loaded)),
            ("gauge", "draining", "1 while the server ends.", float(service.draining)),
            ("gauge", "uptime_seconds", "Time since the server began.", time.time() - service.started),
        ]  # fmt: skip

    def _family(self, prefix: str, kind: _Kind, name: str, text: str, values: float | _Values) -> Metric:
        family: Metric = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(prefix + name, text)
        suffix = "_total" if kind == "counter" else ""
        for labels, value in (values if isinstance(values, Mapping) else {(): values}).items():
            family.add_sample(
                prefix + name + suffix, {"model_name": self._service.settings.model, **dict(labels)}, value
            )
        return family

    def _histogram(self, name: str, text: str, buckets: list[tuple[str, float]], total: float) -> Iterator[Metric]:
        for prefix in ("hadal_", "vllm:"):
            family = HistogramMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric([self._service.settings.model], buckets, total)
            yield family


def _by(label: str, values: Mapping[Any, float]) -> _Values:
    return {((label, str(name)),): value for name, value in values.items()}


def _labels(values: Mapping[str, object]) -> _Labels:
    return tuple((name, str(value)) for name, value in values.items())


def router(service: Service) -> APIRouter:
    """GET /metrics."""
    metrics = Metrics(service)
    made = APIRouter(include_in_schema=False)

    @made.get("/metrics")
    async def read() -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    return made
