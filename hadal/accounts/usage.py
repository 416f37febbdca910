"""Sums over the ledger by key, day, model or whatever else a row holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from hadal.accounts import tables
from hadal.accounts.tables import AccountsError, cause, to_dollars

_DAY = 86_400_000  # milliseconds
_PLAIN = ("user", "tenant", "api", "model", "priority", "batch", "finish_reason", "status", "price_list")
GROUPS = ("key", "day", "month", *_PLAIN)


@dataclass(frozen=True)
class Usage:
    """Sums of one group of requests: tokens, USD, and mean seconds (None where nothing was measured)."""

    group: dict[str, Any]
    requests: int
    errors: int  # requests that ended with a status of 400 or more
    hit: int
    miss: int
    output: int
    reasoning: int
    cost: Decimal
    first_token_s: float | None
    total_s: float


def sum_usage(
    engine: Engine, since: datetime | None = None, until: datetime | None = None, by: tuple[str, ...] = ()
) -> list[Usage]:
    """Sums of the rows that arrived from `since` up to before `until` (aware), a group for each value of `by`.

    Keys are named, days and months are in UTC. Raises AccountsError for an unknown group or when the database is away.
    """
    for name in by:
        if name not in GROUPS:
            raise AccountsError(f"usage cannot be grouped by {name!r}; take {', '.join(GROUPS)}")
    row = tables.ledger.c
    exact = {
        "key": sa.func.coalesce(tables.keys.c.name, row.key),
        "day": row.time // _DAY,
        "month": row.time // _DAY,
        **{name: row[name] for name in _PLAIN},
    }
    groups = [exact[name].label(f"by_{name}") for name in by]
    sums = [
        sa.func.count(),
        sa.func.sum(sa.case((row.status >= 400, 1), else_=0)),
        *(sa.func.sum(column) for column in (row.hit, row.miss, row.output, row.reasoning, row.cost)),
        sa.func.count(row.first_token_s), sa.func.sum(row.first_token_s), sa.func.sum(row.total_s),
    ]  # fmt: skip
    query = sa.select(*groups, *sums).select_from(
        tables.ledger.outerjoin(tables.keys, tables.keys.c.id == tables.ledger.c.key)
    )
    if since:
        query = query.where(row.time >= int(since.timestamp() * 1000))
    if until:
        query = query.where(row.time < int(until.timestamp() * 1000))
    try:
        with engine.connect() as connection:
            found = connection.execute(query.group_by(*groups)).all()
    except SQLAlchemyError as error:
        raise AccountsError(f"cannot read the ledger ({cause(error)}); try again") from None
    merged: dict[tuple[Any, ...], list[Any]] = {}
    for line in found:
        name_of = tuple(_named(name, value) for name, value in zip(by, line, strict=False))
        values = [value or 0 for value in line[len(by) :]]
        into = merged.setdefault(name_of, [0] * len(values))
        into[:] = [a + b for a, b in zip(into, values, strict=True)]
    return [
        _usage(dict(zip(by, group, strict=True)), values)
        for group, values in sorted(merged.items(), key=lambda item: [str(part) for part in item[0]])
        if values[0]
    ]


def _named(name: str, value: Any) -> Any:
    if name not in ("day", "month"):
        return value
    day = (date(1970, 1, 1) + timedelta(days=int(value))).isoformat()
    return day if name == "day" else day[:7]


def _usage(group: dict[str, Any], values: list[Any]) -> Usage:
    requests, errors, hit, miss, output, reasoning, cost, measured, first_token, total = values
    return Usage(
        group, int(requests), int(errors), int(hit), int(miss), int(output), int(reasoning), to_dollars(cost),
        first_token / measured if measured else None, total / requests,
    )  # fmt: skip
