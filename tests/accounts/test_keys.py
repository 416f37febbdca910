"""Keys: what is stored of them, who is let in, and how fast a change counts elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from hadal.accounts import Accounts, AccountsError, Limits, tables

Open = Callable[..., Accounts]


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_only_the_hash_of_a_secret_is_stored(opened: Open, url: str) -> None:
    accounts = opened(url)
    assert not accounts.has_keys
    key, secret = accounts.keys.create("alice", Limits(budget=Decimal("0.1"), concurrent=2))
    assert re.fullmatch(r"sk-hadal-[\w-]{43}", secret) and secret.startswith(key.prefix)
    assert accounts.find(secret) == key and accounts.has_keys
    engine = tables.open_database(url)
    with engine.connect() as connection:
        stored = str(connection.execute(sa.select(tables.keys)).one())
    engine.dispose()
    assert secret[len(key.prefix) :] not in stored


@pytest.mark.parametrize("secret", ["", "sk-hadal-", "sk-hadal-" + "x" * 43, "\udc80", "ключ", "a" * 10**6])
def test_what_is_no_secret_finds_no_key(opened: Open, secret: str) -> None:
    accounts = opened()
    accounts.keys.create("alice")
    assert accounts.find(secret) is None


def test_a_revoked_key_is_useless_and_still_keeps_the_service_closed(opened: Open) -> None:
    accounts = opened()
    _, secret = accounts.keys.create("alice")
    assert accounts.keys.revoke("alice").revoked
    assert accounts.find(secret) is None
    assert accounts.has_keys
    with pytest.raises(AccountsError, match="no key in use"):
        accounts.keys.revoke("alice")


def test_a_name_is_taken_until_its_key_is_revoked(opened: Open, url: str) -> None:
    accounts = opened(url)
    first, _ = accounts.keys.create("alice")
    with pytest.raises(AccountsError, match="in use"):
        accounts.keys.create("alice")
    accounts.keys.revoke(first.id)
    second, secret = accounts.keys.create("alice")
    assert accounts.find(secret) == second
    assert [key.id for key in accounts.keys.list()] == [first.id, second.id]


def test_a_key_ends_when_it_was_to_end(opened: Open) -> None:
    now = [1_800_000_000.0]
    accounts = opened(clock=lambda: now[0])
    _, secret = accounts.keys.create("alice", expires=datetime.fromtimestamp(now[0] + 10, UTC))
    now[0] += 9.9
    assert accounts.find(secret)
    now[0] += 0.1
    assert accounts.find(secret) is None


def test_changes_count_in_another_server_within_two_seconds(opened: Open, url: str) -> None:
    here, there = opened(url), opened(url)
    _, secret = there.keys.create("alice", Limits(concurrent=1))
    assert soon(lambda: here.find(secret) is not None)
    there.keys.limit("alice", tokens=5)
    assert soon(lambda: here.find(secret).limits == Limits(concurrent=1, tokens=5))
    there.keys.revoke("alice")
    assert soon(lambda: here.find(secret) is None)


def test_a_burst_of_callers_costs_no_query(opened: Open) -> None:
    accounts = opened()
    _, secret = accounts.keys.create("alice")
    queries = []
    sa.event.listen(accounts.database, "before_cursor_execute", lambda *call: queries.append(call[2]))
    began = time.monotonic()
    for _ in range(2000):
        assert accounts.find(secret) and not accounts.find(secret + "x")
    assert len(queries) <= 5 * (1 + time.monotonic() - began)


@given(
    budget=st.none() | st.decimals(0, 10**6, places=12),
    counts=st.lists(st.none() | st.integers(0, 10**15), min_size=4, max_size=4),
    period=st.sampled_from(["day", "month", "total"]),
)
def test_limits_survive_the_database(budget: Decimal | None, counts: list[int | None], period: str) -> None:
    from hadal.accounts import keys

    limits = Limits(*counts[:3], budget, counts[3], period)
    stored = keys._columns(limits)
    row = type("Row", (), stored | dict.fromkeys(["id", "name", "prefix", "expires", "revoked"], None) | {"created": 0})
    assert keys._key(row).limits == limits


@pytest.mark.parametrize("wrong", [{"tokens": -1}, {"budget": Decimal(10**7)}, {"period": "week"}])
def test_limits_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(AccountsError):
        Limits(**wrong)


@pytest.mark.parametrize("name", ["", "x" * 201, "two\nlines"])
def test_names_that_cannot_be_shown_are_refused(opened: Open, name: str) -> None:
    with pytest.raises(AccountsError, match="printable"):
        opened().keys.create(name)
