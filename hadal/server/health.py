"""Health: whether the server lives, has started and takes requests, and the figures that the page draws."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

import hadal
from hadal.accounts import AccountsError
from hadal.server.metrics import Vitals, take_vitals
from hadal.server.service import Service

_SAMPLE_SECONDS = 5.0
_SAMPLES = 180
_SPEND_SECONDS = 5.0  # how old the sums over the ledger may be
_RETRY = {"retry-after": "5"}
_log = logging.getLogger("hadal.server")


@dataclass
class Startup:
    """How loading goes: the lines of progress, each with seconds since the start."""

    began: float = field(default_factory=time.monotonic)
    stages: list[tuple[float, str]] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a line, from any thread."""
        self.stages.append((time.monotonic() - self.began, line))

    def to_dict(self) -> dict[str, Any]:
        """The shape of GET /startupz."""
        stages = [{"at_s": round(at, 3), "line": line} for at, line in self.stages]
        return {"elapsed_s": round(time.monotonic() - self.began, 3), "stages": stages}


class History:
    """Figures of the last quarter of an hour, one sample each five seconds, and the spending of the ledger."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._samples: deque[dict[str, float]] = deque(maxlen=_SAMPLES)
        self._at, self._before = time.monotonic(), (0, 0, 0, 0)
        self._spend: tuple[float, dict[str, Any] | None] = (-_SPEND_SECONDS, None)

    async def keep(self) -> None:
        """Sample for ever."""
        while True:
            try:
                self.sample()
            except Exception:  # a figure that is missing is no reason to show none from then on
                _log.exception("the figures of now could not be taken")
            await asyncio.sleep(_SAMPLE_SECONDS)

    def sample(self) -> None:
        """Add the figures of now."""
        now = take_vitals(self._service)
        figures = self._rates(now)
        self._samples.append({"t": time.time(), "running": now.running, "waiting": now.waiting, **figures})
        self._at, self._before = time.monotonic(), _counts(now)

    def _rates(self, now: Vitals) -> dict[str, float]:
        """Since the last sample; where that was just now, or nothing was looked up since, those before count on."""
        passed = time.monotonic() - self._at
        last = self._samples[-1] if self._samples else {}
        written, read, prompt, hit = (a - b for a, b in zip(_counts(now), self._before, strict=True))
        rates = {"tokens_per_second": written / passed, "prefill_tokens_per_second": read / passed}
        if passed < _SAMPLE_SECONDS / 5 and last:
            rates = {name: last[name] for name in rates}
        return rates | {"hit_rate": hit / prompt if prompt else last.get("hit_rate", 0.0)}

    async def tell(self) -> dict[str, Any]:
        """The shape of GET /status; without `spend` while the ledger cannot be read."""
        service, now = self._service, take_vitals(self._service)
        stats, rates = now.stats, self._rates(now)
        cache = {
            "used_bytes": now.cache_used,
            "total_bytes": now.cache_total,
            "hit_rate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            "reasons": {reason: n for reason, n in stats.cache.copy().items() if reason != "hit"},
        }
        spend = await self._sum_spend()
        return {
            "model": service.settings.model,
            "started": service.started,
            "running": now.running,
            "waiting": now.waiting,
            "max_concurrent": now.max_concurrent,
            "tokens_per_second": rates["tokens_per_second"],
            "prefill_tokens_per_second": rates["prefill_tokens_per_second"],
            "cache": cache,
            "draft_acceptance": stats.acceptance if stats.drafted else None,
            "history": list(self._samples),
            **({} if spend is None else {"spend": spend}),
            "uptime_s": time.time() - service.started,
            "version": hadal.__version__,
        }

    async def _sum_spend(self) -> dict[str, Any] | None:
        at, spend = self._spend
        if time.monotonic() - at >= _SPEND_SECONDS:
            self._spend = (time.monotonic(), spend)  # others who ask meanwhile get the sums of before
            spend = await asyncio.to_thread(self._read_spend)
            self._spend = (time.monotonic(), spend)
        return spend

    def _read_spend(self) -> dict[str, Any] | None:
        accounts = self._service.accounts
        try:
            usage = accounts.usage(by=("day",))
        except AccountsError:
            return None
        days = [
            {"day": u.group["day"], "cost": float(u.cost), "hit": u.hit, "miss": u.miss, "output": u.output}
            for u in usage
        ]
        today = datetime.now(UTC).date().isoformat()
        return {
            "currency": "USD",
            "price_list": accounts.price_list,
            "today": sum(day["cost"] for day in days if day["day"] == today),
            "total": sum(day["cost"] for day in days),
            "by_day": days,
        }


def _counts(now: Vitals) -> tuple[int, int, int, int]:
    stats = now.stats
    return stats.generated, stats.prefilled, stats.prompt_tokens, stats.cached_tokens


def obstacle(service: Service) -> tuple[str, str] | None:
    """Why no request would be served now, as a word and a sentence; None when it would."""
    if service.draining:
        return "draining", "the server is shutting down"
    if not service.loaded:
        return "loading", "the model is being loaded"
    if not service.accounts.healthy:
        return "ledger", service.accounts.problem or "answers cannot be accounted for"
    return None


def router(service: Service) -> APIRouter:
    """GET /livez, /readyz (and /health), /startupz, /status; `app.state.startup` is a Startup where one is loading."""
    history = History(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(history.keep())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    made = APIRouter(lifespan=lifespan)

    @made.get("/livez")
    @made.head("/livez", include_in_schema=False)
    async def livez() -> dict[str, Any]:
        """Whether the process answers."""
        return {"status": "ok", "active_requests": len(service.seats)}

    @made.get("/readyz")
    @made.head("/readyz", include_in_schema=False)
    @made.get("/health", include_in_schema=False)
    @made.head("/health", include_in_schema=False)
    async def readyz() -> Response:
        """Whether requests are served now; 503 with the reason when not."""
        if found := obstacle(service):
            return JSONResponse({"status": found[0], "reason": found[1]}, 503, _RETRY)
        return JSONResponse({"status": "ready"})

    @made.get("/startupz")
    @made.head("/startupz", include_in_schema=False)
    async def startupz(request: Request) -> Response:
        """Whether the model has been loaded, and how that went; 503 until then."""
        startup = getattr(request.app.state, "startup", None)
        told = startup.to_dict() if startup else {}
        if service.loaded:
            return JSONResponse({"status": "started", **told})
        return JSONResponse({"status": "loading", **told}, 503, _RETRY)

    @made.get("/status")
    async def status() -> dict[str, Any]:
        """What the server does and did: queue, cache, throughput, spend."""
        return await history.tell()

    return made
