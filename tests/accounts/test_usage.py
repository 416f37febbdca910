"""Sums over the ledger against a plain recount, and that totals kept for limits agree with them."""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.accounts import GROUPS, Accounts, AccountsError, UsageRow, tables

COUNT = st.integers(0, 10**7)
ROWS = st.lists(
    st.builds(
        UsageRow,
        id=st.just(""),
        time=st.datetimes(datetime(2026, 10, 30), datetime(2026, 12, 2)).map(lambda t: t.replace(tzinfo=UTC)),
        api=st.sampled_from(["chat", "responses"]),
        model=st.sampled_from(["nano", "flash"]),
        key=st.sampled_from([None, "key-1", "key-2"]),
        user=st.sampled_from(["", "u"]),
        hit=COUNT,
        miss=COUNT,
        output=COUNT,
        reasoning=COUNT,
        first_token_s=st.none() | st.floats(0, 10),
        total_s=st.floats(0, 100),
        status=st.sampled_from([200, 429, 500]),
        cost=st.decimals(0, 100, places=12),
    ),
    max_size=30,
)
BY = st.lists(st.sampled_from(["key", "day", "month", "model", "api", "user", "status"]), unique=True, max_size=3)


def group(row: UsageRow, by: list[str]) -> tuple[object, ...]:
    day = row.time.date().isoformat()
    return tuple({"day": day, "month": day[:7]}.get(name, getattr(row, name, None)) for name in by)


@settings(max_examples=25, deadline=None)
@given(ROWS, BY, st.integers(0, 33), st.integers(0, 33))
def test_usage_equals_a_recount(rows: list[UsageRow], by: list[str], first: int, days: int) -> None:
    since = datetime(2026, 10, 30, tzinfo=UTC) + timedelta(days=first)
    until = since + timedelta(days=days)
    rows = [replace(row, id=f"r{number}") for number, row in enumerate(rows)]
    expected: dict[tuple[object, ...], list[UsageRow]] = defaultdict(list)
    for row in rows:
        if since <= row.time < until:
            expected[group(row, by)].append(row)
    with tempfile.TemporaryDirectory() as folder, Accounts(folder=Path(folder)) as accounts:
        for future in [accounts.record(row) for row in rows]:
            future.result(10)
        found = {tuple(one.group.values()): one for one in accounts.usage(since, until, tuple(by))}
        kept = _totals(accounts)
    assert set(found) == set(expected)
    for name, one in found.items():
        here = expected[name]
        assert one.requests == len(here)
        assert one.errors == sum(row.status >= 400 for row in here)
        assert one.cost == sum((row.cost for row in here), Decimal(0))
        for count in ("hit", "miss", "output", "reasoning"):
            assert getattr(one, count) == sum(getattr(row, count) for row in here)
        measured = [row.first_token_s for row in here if row.first_token_s is not None]
        assert one.first_token_s == (pytest.approx(sum(measured) / len(measured)) if measured else None)
        assert one.total_s == pytest.approx(sum(row.total_s for row in here) / len(here))
    recount: dict[tuple[str, str], int] = defaultdict(int)
    for row, size in itertools.product(rows, (10, 7)):
        recount[row.time.date().isoformat()[:size], row.key or ""] += int(row.cost * 10**12)
    assert {name: cost for name, cost in kept.items() if name[0] != "total"} == recount


def _totals(accounts: Accounts) -> dict[tuple[str, str], int]:
    with accounts.database.connect() as connection:
        return {(row.period, row.key): row.cost for row in connection.execute(sa.select(tables.totals))}


def test_both_databases_group_by_everything(opened: Callable[..., Accounts], url: str) -> None:
    accounts = opened(url)
    key, _ = accounts.keys.create("alice")
    when = datetime(2026, 11, 30, 23, 59, 59, 999000, tzinfo=UTC)
    rows = [
        UsageRow("a", when, "chat", "nano", key.id, hit=1, output=2, first_token_s=0.5, total_s=2, cost=Decimal("0.1")),
        UsageRow("b", when, "chat", "nano", key.id, miss=3, first_token_s=1.5, total_s=4, cost=Decimal("1E-12")),
        UsageRow("c", when + timedelta(milliseconds=1), "chat", "nano", status=500),
    ]
    for future in [accounts.record(row) for row in rows]:
        future.result(10)
    (november, december) = accounts.usage(by=("month", "key"))
    assert november.group == {"month": "2026-11", "key": "alice"}
    assert (november.requests, november.errors, november.cost) == (2, 0, Decimal("0.100000000001"))
    assert (november.hit, november.miss, november.output) == (1, 3, 2)
    assert (november.first_token_s, november.total_s) == (1.0, 3.0)
    assert december.group == {"month": "2026-12", "key": None} and december.errors == 1
    assert december.first_token_s is None
    assert sum(one.requests for one in accounts.usage(by=GROUPS)) == 3
    assert accounts.usage(since=when + timedelta(days=1)) == []


def test_an_unknown_group_is_refused(opened: Callable[..., Accounts]) -> None:
    with pytest.raises(AccountsError, match="'moon'"):
        opened().usage(by=("moon",))
