"""Who may begin a request now: the limits of each key against what it has used and what it has under way.

Rates are counted in seconds of the wall clock, so that what other servers report can be added, and a request may wait
up to a second more than it must. What a request may need at most is reserved before it begins, so that a budget is
never exceeded whatever runs at once; what was not used is free again when it ends. Tokens per minute are reserved the
same way, but a request that is alone needs room for its prompt only: most answers stay far below their limit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal

from hadal.accounts.keys import Key, Limits
from hadal.accounts.tables import to_dollars, to_pico

_MINUTE = 61  # seconds until all of a second has left the window of 60
_SOON = 1.0  # seconds after which asking again makes sense when requests under way are in the way


class LimitReached(Exception):
    """A key may not begin this request; `status` is 429 (later) or 402 (budget), `retry_after` seconds if known."""

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass
class _Meter:
    """What one key uses. A use is (tokens, trillionths of a dollar), a rate is (requests, tokens)."""

    running: int = 0
    answers: int = 0  # tokens that what runs may answer yet
    reserved: tuple[int, int] = (0, 0)
    used: dict[str, tuple[int, int]] = field(default_factory=dict)  # by period
    here: dict[int, tuple[int, int]] = field(default_factory=dict)  # by second
    elsewhere: dict[int, tuple[int, int]] = field(default_factory=dict)


class Hold:
    """The place of one request under way."""

    def __init__(self, leave: Callable[[], None] | None = None) -> None:
        self._leave = leave

    def leave(self) -> None:
        """Give the place back; the second time does nothing."""
        leave, self._leave = self._leave, None
        if leave:
            leave()


class Gate:
    """Lets requests in, key by key. `lock` guards all of it and may be held around several calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lock = threading.Condition()
        self._clock = clock
        self._meters: dict[str, _Meter] = {}

    def enter(self, key: Key, tokens: int, output: int, cost: Decimal) -> Hold:
        """Let a request of `tokens` prompt tokens and at most `output` and `cost` (USD) in, or raise LimitReached."""
        now, limits, most = self._clock(), key.limits, (tokens + output, to_pico(cost))
        with self.lock:
            meter = self._meters.setdefault(key.id, _Meter())
            for seconds in (meter.here, meter.elsewhere):
                for second in [s for s in seconds if s + _MINUTE <= now]:
                    del seconds[second]
            if limits.concurrent is not None and meter.running >= limits.concurrent:
                raise LimitReached(
                    f"this key may have {limits.concurrent} requests under way; wait until one has ended", 429, _SOON
                )
            _check_rate(meter, 0, 1, limits.requests_per_minute, "requests", now)
            held = meter.answers + output if meter.running else 0
            _check_rate(meter, 1, tokens, limits.tokens_per_minute, "tokens", now, held)
            _check_period(meter, limits, most, now)
            meter.running += 1
            meter.answers += output
            meter.reserved = _sum(meter.reserved, most)
            meter.here[int(now)] = _sum(meter.here.get(int(now), (0, 0)), (1, tokens))

        def leave() -> None:
            with self.lock:
                meter.running -= 1
                meter.answers -= output
                meter.reserved = (meter.reserved[0] - most[0], meter.reserved[1] - most[1])

        return Hold(leave)

    def spend(self, key: str, when: datetime, prompt: int, output: int, cost: int) -> None:
        """Count what a request has used; `cost` in trillionths of a dollar."""
        with self.lock:
            self._use(key, when, prompt + output, cost)
            here, second = self._meters[key].here, int(self._clock())
            here[second] = _sum(here.get(second, (0, 0)), (0, output))

    def load(
        self,
        totals: Iterable[tuple[str, str, int, int]],
        elsewhere: Iterable[tuple[str, int, int, int]],
        unsaved: Iterable[tuple[str, datetime, int, int]],
    ) -> None:
        """Replace what is known by what the database holds and by what is not in it yet.

        `totals` are (period, key, tokens, cost), `elsewhere` (key, second, requests, tokens) of other servers,
        `unsaved` (key, time, tokens, cost). The caller holds the lock since it gathered `unsaved`.
        """
        for meter in self._meters.values():
            meter.used, meter.elsewhere = {}, {}
        for period, key, tokens, cost in totals:
            self._meters.setdefault(key, _Meter()).used[period] = (tokens, cost)
        for key, second, requests, tokens in elsewhere:
            self._meters.setdefault(key, _Meter()).elsewhere[second] = (requests, tokens)
        for key, when, tokens, cost in unsaved:
            self._use(key, when, tokens, cost)

    def left(self, key: Key) -> Decimal | None:
        """USD that remain of the key's budget, not counting what is under way; None without a budget."""
        if key.limits.budget is None:
            return None
        with self.lock:
            used = self._meters.get(key.id, _Meter()).used
            spent = used.get(_label(key.limits, self._clock()), (0, 0))[1]
        return max(Decimal(0), key.limits.budget - to_dollars(spent))

    def _use(self, key: str, when: datetime, tokens: int, cost: int) -> None:
        used = self._meters.setdefault(key, _Meter()).used
        for period in periods(when):
            used[period] = _sum(used.get(period, (0, 0)), (tokens, cost))


def periods(when: datetime) -> tuple[str, str, str]:
    """Names of the day, the month and the whole time that a request at `when` belongs to, in UTC."""
    day = when.astimezone(UTC).date().isoformat()
    return day, day[:7], "total"


def _label(limits: Limits, now: float) -> str:
    return dict(zip(("day", "month", "total"), periods(datetime.fromtimestamp(now, UTC)), strict=True))[limits.period]


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _check_rate(meter: _Meter, which: int, more: int, limit: int | None, what: str, now: float, held: int = 0) -> None:
    if limit is None:
        return
    if more > limit:
        raise LimitReached(
            f"this key may use {limit} {what} per minute and this request alone needs {more}; make it smaller", 429
        )
    seconds = sorted([*meter.here.items(), *meter.elsewhere.items()])
    recent = sum(counts[which] for _, counts in seconds)
    if recent + more + held <= limit:
        return
    if recent + more <= limit:
        raise LimitReached(
            f"this key may use {limit} {what} per minute, which requests under way may need; try again when they have "
            "ended, or lower max_tokens", 429, _SOON,
        )  # fmt: skip
    for second, counts in seconds:
        recent -= counts[which]
        if recent + more <= limit:
            wait = max(_SOON, second + _MINUTE - now)
            raise LimitReached(
                f"this key may use {limit} {what} per minute; try again in {wait:.0f} seconds", 429, wait
            )


def _check_period(meter: _Meter, limits: Limits, most: tuple[int, int], now: float) -> None:
    used, reserved = meter.used.get(_label(limits, now), (0, 0)), meter.reserved
    budget = None if limits.budget is None else to_pico(limits.budget)
    for which, limit in ((1, budget), (0, limits.tokens)):
        if limit is None or used[which] + reserved[which] + most[which] <= limit:
            continue
        left, need = (_shown(which, count) for count in (max(0, limit - used[which]), most[which]))
        whole = f"this key's {'budget' if which else 'allowance'} of {_shown(which, limit)} {_span(limits, now)}"
        if used[which] >= limit:
            raise LimitReached(f"{whole} is used up; ask for a larger one or wait for the next period", 402)
        if used[which] + most[which] > limit:
            raise LimitReached(f"{whole} has {left} left and this request may need {need}; lower max_tokens", 402)
        raise LimitReached(
            f"{whole} has {left} left, which requests under way may need; try again when they have ended", 429, _SOON
        )


def _shown(which: int, count: int) -> str:
    return f"${to_dollars(count).normalize():f}" if which else f"{count} tokens"


def _span(limits: Limits, now: float) -> str:
    if limits.period == "total":
        return "in all"
    return f"for {_label(limits, now)} (UTC)"
