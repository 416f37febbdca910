"""`hadal keys` and `hadal usage` as a person or a script meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hadal.accounts import Accounts, Limits, UsageRow
from hadal.cli import app

Run = Callable[..., Result]


@pytest.fixture
def hadal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a verb on the data folder of the test."""
    monkeypatch.setenv("HADAL_DATA", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, list(words))


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_key_is_made_limited_listed_and_revoked(hadal: Run) -> None:
    secret = hadal("keys", "create", "alice", "--budget", "12.5", "--period", "day", "--concurrent", "4").stdout.strip()
    with Accounts() as accounts:
        key = accounts.find(secret)
    assert key and key.limits == Limits(budget=Decimal("12.5"), period="day", concurrent=4)
    changed = parsed(hadal("keys", "limit", "alice", "--tokens", "100", "--budget", "$3", "--json"))
    assert (changed["tokens"], changed["budget"], changed["concurrent"]) == (100, "3.000000000000", 4)
    (listed,) = parsed(hadal("keys", "list", "--json"))
    assert listed["name"] == "alice" and listed["left"] == "3.000000000000" and "hash" not in listed
    assert "4 at once, $3.00 a day, 100 tokens a day" in hadal("keys", "list").stdout
    assert hadal("keys", "limit", "alice", "--unlimited").stdout == "alice: none\n"
    assert "revoked alice" in hadal("keys", "revoke", "alice").stdout
    assert "revoked" in hadal("keys", "list").stdout


def test_a_key_with_an_end_is_made_for_scripts(hadal: Run) -> None:
    made = parsed(hadal("keys", "create", "robot", "--expires", "2027-01-01", "--json"))
    assert made["expires"] == "2027-01-01T00:00:00+00:00" and made["secret"].startswith(made["prefix"])


def test_usage_is_summed_over_the_time_asked_for(hadal: Run) -> None:
    with Accounts() as accounts:
        for day in (21, 22, 23):
            when = datetime(2026, 11, day, tzinfo=UTC)
            accounts.record(UsageRow(f"r{day}", when, "chat", "nano", hit=1000, cost=Decimal("1E-7"))).result(10)
    rows = parsed(hadal("usage", "--since", "2026-11-22", "--until", "2026-11-23", "--by", "day,model", "--json"))
    assert [(row["day"], row["model"], row["requests"], row["cost"]) for row in rows] == [
        ("2026-11-22", "nano", 1, "0.000000100000")
    ]
    table = hadal("usage").stdout
    assert "3,000" in table and "$0.000000" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("keys", "create", "x", "--period", "week"), "unknown period 'week'"),
        (("keys", "revoke", "nobody"), "no key in use is named 'nobody'"),
        (("keys", "create", "x", "--budget", "much"), "no amount of USD"),
        (("keys", "create", "x", "--budget", "nan"), "no amount of USD"),
        (("usage", "--by", "moon"), "cannot be grouped by 'moon'"),
        (("usage", "--since", "yesterday"), "is no time"),
        (("usage", "--database", "mysql://x/y"), "sqlite:// or postgresql://"),
    ],
)
def test_mistakes_are_told_in_a_sentence(hadal: Run, words: tuple[str, ...], said: str) -> None:
    result = hadal(*words)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output
