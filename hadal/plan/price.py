"""What tokens cost: price lists with their history as data, exact sums, and what a machine must do to be worth it."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import threading
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

_log = logging.getLogger("hadal.plan")
_RECHECK = 1.0  # seconds between two looks at the user's file
_RATES = ("hit", "miss", "output")
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")


class PriceError(ValueError):
    """A price list that is malformed, unknown or has no price yet at the time asked for."""


@dataclass(frozen=True)
class Price:
    """USD per million tokens: prompt tokens that hit the cache, those that missed it, tokens of the answer."""

    hit: Decimal
    miss: Decimal
    output: Decimal
    source: str = ""
    since: datetime | None = None  # None: always
    peak: bool = False

    def cost(self, hit: int, miss: int, output: int) -> Decimal:
        """Exact USD for these numbers of tokens."""
        return (hit * self.hit + miss * self.miss + output * self.output).scaleb(-6)


@dataclass(frozen=True)
class _Step:
    base: Price
    peak: Price | None
    windows: tuple[tuple[int, int], ...]  # minutes of the day in UTC, the end left out
    holidays: frozenset[date]

    def at(self, when: datetime) -> Price:
        minute = when.hour * 60 + when.minute
        working = when.weekday() < 5 and when.date() not in self.holidays
        if self.peak and working and any(first <= minute < end for first, end in self.windows):
            return self.peak
        return self.base


class PriceBook:
    """All price lists by name: the packaged ones and, over them, those of a TOML file that is read again on change."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._checked = time.monotonic()
        self._stamp = self._look()
        self._lists = _packaged() | (_read(path) if path else {})
        self.problem: str | None = None  # why the newest state of the file is not in use

    @classmethod
    def load(cls, path: Path | None = None) -> PriceBook:
        """The packaged lists and those of `path`; raises PriceError when the file cannot be used."""
        return cls(path)

    @property
    def names(self) -> list[str]:
        """Names of all lists, sorted."""
        return sorted(self._lists)

    def price(self, name: str, when: datetime) -> Price:
        """The price of list `name` at `when` (aware); raises PriceError for unknown names and times before the list."""
        self._refresh()
        steps = self._lists.get(name)
        if steps is None:
            raise PriceError(f"unknown price list {name!r}; known are {', '.join(self.names)}")
        utc = when.astimezone(UTC)
        for step in reversed(steps):
            if step.base.since is None or step.base.since <= utc:
                return step.at(utc)
        first = steps[0].base.since
        raise PriceError(f"price list {name!r} begins on {first:%Y-%m-%d}; ask for a later time")

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._checked < _RECHECK:
            return
        with self._lock:
            self._checked, stamp = now, self._look()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                fresh = _packaged() | _read(self._path)
                if lost := sorted(set(self._lists) - set(fresh)):
                    raise PriceError(f"{self._path} no longer has the price list {lost[0]!r}; restart to drop a list")
            except PriceError as error:
                self.problem = f"{error}; the former prices stay in use"
                _log.error("%s", self.problem)
                return
            self._lists, self.problem = fresh, None
            _log.info("prices read again from %s", self._path)

    def _look(self) -> tuple[int, int] | None:
        try:
            facts = self._path.stat() if self._path else None
        except OSError:
            return None
        return (facts.st_mtime_ns, facts.st_size) if facts else None


def machine_price(dollars_per_hour: float, tokens_per_second: float) -> float:
    """USD per million tokens of a machine that earns its hourly price with this many tokens a second."""
    return dollars_per_hour / (tokens_per_second * 0.0036)


def break_even(
    dollars_per_hour: float, tokens_per_second: float, price: Price, hit: int, miss: int, output: int
) -> float:
    """Share of full load at which a machine costs what an API would charge for the same answers; above 1: never.

    `tokens_per_second` counts answered tokens at full load; `hit`, `miss` and `output` are a typical request's tokens.
    """
    charged = float(price.cost(hit, miss, output)) / output * 1e6
    return machine_price(dollars_per_hour, tokens_per_second) / charged


@functools.cache
def _packaged() -> dict[str, tuple[_Step, ...]]:
    lists: dict[str, tuple[_Step, ...]] = {}
    for file in (files("hadal") / "assets" / "prices").iterdir():
        lists |= _parse(file.read_text("utf-8"), file.name)
    return lists


def _read(path: Path) -> dict[str, tuple[_Step, ...]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PriceError(f"cannot read the price lists in {path} ({error}); give a TOML file") from None
    return _parse(text, str(path))


def _parse(text: str, where: str) -> dict[str, tuple[_Step, ...]]:
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise PriceError(f"{where} is not TOML ({error}); correct it") from None
    return {name: _list(steps, f"{where}, list {name!r}") for name, steps in tables.items()}


def _list(tables: Any, where: str) -> tuple[_Step, ...]:
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise PriceError(f"{where}: a list is written as [[name]] tables, one per step; correct it")
    steps = tuple(_step(table, f"{where}, step {number}") for number, table in enumerate(tables, 1))
    times = [step.base.since for step in steps]
    if None in times[1:] or any(a and b and a >= b for a, b in itertools.pairwise(times)):
        raise PriceError(f"{where}: steps go from the oldest to the newest and only the first may lack `from`; reorder")
    return steps


def _step(table: dict[str, Any], where: str) -> _Step:
    _known(table, {*_RATES, "from", "source", "peak"}, where)
    since, source, peak = table.get("from"), table.get("source", ""), table.get("peak")
    if since is not None and not (isinstance(since, datetime) and since.tzinfo):
        raise PriceError(f"{where}: `from` must be a time with its zone such as 2026-04-24T00:00:00Z; correct it")
    if not isinstance(source, str):
        raise PriceError(f"{where}: `source` must be a text; put it in quotes")
    hit, miss, output = _rates(table, where)
    base = Price(hit, miss, output, source, since and since.astimezone(UTC))
    if peak is None:
        return _Step(base, None, (), frozenset())
    if not isinstance(peak, dict):
        raise PriceError(f"{where}: `peak` must be a table; correct it")
    _known(peak, {*_RATES, "hours", "holidays"}, where)
    hours, holidays = peak.get("hours"), peak.get("holidays", [])
    if not isinstance(hours, list) or not (matches := [_HOURS.fullmatch(str(span)) for span in hours]):
        raise PriceError(f'{where}: `peak` needs `hours` such as ["01:00-04:00"] (UTC); add them')
    windows = [(int(m[1]) * 60 + int(m[2]), int(m[3]) * 60 + int(m[4])) for m in matches if m]
    if len(windows) < len(hours) or any(first >= end for first, end in windows):
        raise PriceError(f'{where}: `hours` are spans of one day (UTC) such as "01:00-04:00"; correct {hours}')
    if not isinstance(holidays, list) or not all(type(day) is date for day in holidays):
        raise PriceError(f"{where}: `holidays` must be dates such as 2026-10-01; correct them")
    hit, miss, output = _rates(peak, where)
    high = Price(hit, miss, output, source, base.since, peak=True)
    return _Step(base, high, tuple(windows), frozenset(holidays))


def _rates(table: Mapping[str, Any], where: str) -> list[Decimal]:
    rates = []
    for name in _RATES:
        value = table.get(name)
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise PriceError(f"{where}: `{name}` must be a number of USD per million tokens; give it")
        rate = Decimal(value)
        if not rate.is_finite() or not 0 <= rate < 10**6 or rate != round(rate, 6):
            raise PriceError(f"{where}: `{name}` must be from 0 to 999999 with at most 6 decimals, not {value}")
        rates.append(rate)
    return rates


def _known(table: Mapping[str, Any], names: set[str], where: str) -> None:
    if unknown := sorted(set(table) - names):
        raise PriceError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(names))}")
