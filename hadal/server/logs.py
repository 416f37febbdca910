"""Logs and traces: one line, and with OpenTelemetry one span, per request at its end; never what was said in it."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Literal

from hadal.server.errors import CLIENT_GONE
from hadal.server.visit import Observer, Visit

_requests = logging.getLogger("hadal.requests")


class TraceError(ValueError):
    """Tracing was asked for and cannot be had; the message says what is missing."""


def configure_logs(form: Literal["text", "json"]) -> None:
    """Send Hadal's and the HTTP server's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else logging.Formatter(_TEXT, _TIME))
    for name in ("hadal", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its comings and goings are told by Hadal itself


_TEXT = "%(asctime)s %(levelname)-7s %(message)s"
_TIME = "%Y-%m-%d %H:%M:%S"


class _JsonFormatter(logging.Formatter):
    """One object per line: time (UTC), level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name}
        told |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def log_visit(visit: Visit) -> None:
    """Write a request's line: who, what, how many tokens, how long, at what cost."""
    fields = visit_fields(visit)
    level = logging.ERROR if visit.status == 500 else logging.INFO
    if _requests.isEnabledFor(level):
        shown = " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if name != "api")
        _requests.log(level, "%s %s", visit.api, shown, extra={"fields": fields})


def _plain(value: Any) -> Any:
    """A value that cannot be taken for two fields or another line; the model's name is the client's own words."""
    return repr(value) if isinstance(value, str) and (" " in value or not value.isprintable()) else value


def visit_fields(visit: Visit) -> dict[str, Any]:
    """What is told of a request; seconds and USD. Absent is what it did not come to."""
    usage, ended = visit.usage, visit.ended or time.monotonic()
    told = {
        "api": visit.api,
        "status": visit.status,
        "id": visit.id,
        "key": visit.caller.key.id if visit.caller.key else None,
        "model": visit.model or None,
        "stream": visit.stream,
        "error": visit.error,
        "finish_reason": visit.finish_reason or None,
        "prompt": usage.prompt if usage else None,
        "hit": usage.hit if usage else None,
        "cache": visit.cache_reason or None,
        "output": usage.output if usage else None,
        "reasoning": usage.reasoning if usage else None,
        "malformed": visit.malformed or None,
        "queue_s": _span(visit.began, visit.admitted),
        "first_token_s": _span(visit.began, visit.first_token),
        "total_s": _span(visit.began, ended),
        "cost_usd": None if visit.cost is None else float(visit.cost),
        "batch": visit.batch,
    }
    return {name: value for name, value in told.items() if value is not None}


def _span(begin: float, end: float | None) -> float | None:
    return None if end is None else round(end - begin, 4)


def make_tracer(exporter: Any = None) -> tuple[Observer, Any]:
    """An observer that makes spans under OpenTelemetry's names for generative AI, and the function that sends the rest.

    Where spans go is said by OTEL_EXPORTER_OTLP_ENDPOINT and the other variables of OpenTelemetry. Raises TraceError
    when its packages are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise TraceError(
            f"tracing lacks a package ({error}); install opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", "hadal")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    tracer, propagator = provider.get_tracer("hadal"), TraceContextTextMapPropagator()

    def trace(visit: Visit) -> None:
        def moment(at: float) -> int:
            return int(visit.received * 1e9) + int((at - visit.began) * 1e9)

        parent = propagator.extract({"traceparent": visit.traceparent}) if visit.traceparent else None
        operation = "text_completion" if visit.api == "completions" else "chat"
        span = tracer.start_span(
            f"{operation} {visit.model}".strip(), parent, SpanKind.SERVER, start_time=moment(visit.began)
        )
        span.set_attributes(_attributes(visit, operation))
        for name, at in (("admitted", visit.admitted), ("first_token", visit.first_token)):
            if at is not None:
                span.add_event(name, timestamp=moment(at))
        if visit.status >= 500 and visit.status != CLIENT_GONE:
            span.set_status(Status(StatusCode.ERROR))
        span.end(moment(visit.ended or time.monotonic()))

    return trace, provider.shutdown


def _attributes(visit: Visit, operation: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "hadal",
        "gen_ai.request.model": visit.model,
        "gen_ai.response.id": visit.id,
        "hadal.api": visit.api,
        "http.response.status_code": visit.status,
    }
    if visit.finish_reason:
        told["gen_ai.response.finish_reasons"] = [visit.finish_reason]
    if visit.usage is not None:
        told["gen_ai.usage.input_tokens"] = visit.usage.prompt
        told["gen_ai.usage.cache_read.input_tokens"] = visit.usage.hit
        told["gen_ai.usage.output_tokens"] = visit.usage.output
    if visit.error is not None:
        told["error.type"] = visit.error
    return told
