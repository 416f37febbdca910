"""Accounts as the service holds them: prices by name, and balances."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from hadal.accounts import Accounts, Limits, UsageRow
from hadal.plan.price import PriceError

Open = Callable[..., Accounts]
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_costs_follow_the_price_list_in_use(opened: Open) -> None:
    accounts = opened()
    assert accounts.price_list == "flash-launch"
    assert accounts.cost(10**6, 10**6, 10**6, NOW) == Decimal("0.448")
    accounts.price_list = "flash"
    assert accounts.cost(10**6, 10**6, 10**6, NOW) == Decimal("0.753")
    with pytest.raises(PriceError, match="unknown price list"):
        accounts.price_list = "flashy"
    assert accounts.price_list == "flash"


def test_the_database_lies_in_the_data_folder_unless_told(opened: Open, tmp_path: Path) -> None:
    assert opened().database.url.database == str(tmp_path / "hadal.db")
    assert opened(f"sqlite:///{tmp_path}/other.db").database.url.database == str(tmp_path / "other.db")


def test_an_unknown_price_list_is_refused_at_the_start(opened: Open) -> None:
    with pytest.raises(PriceError, match="unknown price list"):
        opened(price_list="flashy")


def test_a_balance_is_what_the_budget_leaves(opened: Open) -> None:
    accounts = opened(clock=NOW.timestamp)
    rich, _ = accounts.keys.create("rich")
    poor, _ = accounts.keys.create("poor", Limits(budget=Decimal("0.5")))
    assert accounts.balance(rich).is_available and accounts.balance(rich).left is None
    assert accounts.balance(poor).left == Decimal("0.5")
    accounts.record(UsageRow("a", NOW, "chat", "nano", poor.id, output=1, cost=Decimal("0.7")))
    assert accounts.balance(poor).left == 0
    assert not accounts.balance(poor).is_available
