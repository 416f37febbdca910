"""Prices at each border of their history, at peak hours, exact sums, and files that change while they are in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.plan import price
from hadal.plan.price import Price, PriceBook, PriceError, break_even, machine_price

BOOK = PriceBook.load()
SECOND = timedelta(seconds=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def rates(name: str, when: datetime) -> str:
    found = BOOK.price(name, when)
    return f"{found.hit} {found.miss} {found.output}"


@pytest.mark.parametrize(
    ("name", "border", "before", "after"),
    [
        ("flash", "2026-04-26T12:15", "0.028 0.14 0.28", "0.0028 0.14 0.28"),
        ("flash", "2026-08-16T16:00", "0.0028 0.14 0.28", "0.007 0.22 0.66"),
        ("flash", "2026-09-10T04:00", "0.014 0.44 1.32", "0.003 0.15 0.60"),  # the morning's peak ends there too
        ("pro", "2026-04-26T12:15", "0.145 1.74 3.48", "0.003625 0.435 0.87"),
        ("pro", "2026-08-16T16:00", "0.003625 0.435 0.87", "0.022 0.66 1.98"),
    ],
)
def test_a_step_counts_from_its_first_second(name: str, border: str, before: str, after: str) -> None:
    assert rates(name, at(border) - SECOND) == before
    assert rates(name, at(border)) == after


def test_nothing_has_a_price_before_its_list_begins() -> None:
    assert rates("flash", at("2026-04-24T00:00")) == "0.028 0.14 0.28"
    with pytest.raises(PriceError, match="begins on 2026-04-24"):
        BOOK.price("flash", at("2026-04-24T00:00") - SECOND)


@pytest.mark.parametrize("when", ["1970-01-01T00:00", "2026-11-23T02:00", "2099-01-01T00:00"])
def test_the_launch_list_never_changes(when: str) -> None:
    assert rates("flash-launch", at(when)) == "0.028 0.14 0.28"


@pytest.mark.parametrize(
    ("when", "peak"),
    [
        ("2026-11-23T00:59:59", False),  # a Monday
        ("2026-11-23T01:00", True),
        ("2026-11-23T03:59:59", True),
        ("2026-11-23T04:00", False),
        ("2026-11-23T05:59:59", False),
        ("2026-11-23T06:00", True),
        ("2026-11-23T09:59:59", True),
        ("2026-11-23T10:00", False),
        ("2026-11-27T07:00", True),  # Friday
        ("2026-11-28T07:00", False),  # Saturday
        ("2026-11-29T07:00", False),
        ("2026-10-01T07:00", False),  # China's national day
        ("2026-10-08T07:00", True),
    ],
)
def test_peak_hours_cost_double(when: str, peak: bool) -> None:
    for name, base in (("flash", "0.003 0.15 0.60"), ("pro", "0.022 0.66 1.98")):
        doubled = " ".join(str(Decimal(rate) * 2) for rate in base.split())
        assert rates(name, at(when)) == (doubled if peak else base)
        assert BOOK.price(name, at(when)).peak is peak


def test_the_zone_of_the_time_asked_for_does_not_matter() -> None:
    beijing = datetime.fromisoformat("2026-11-23T09:00:00+08:00")
    assert BOOK.price("flash", beijing).peak


def test_every_packaged_list_names_its_source() -> None:
    assert {"flash", "pro", "flash-launch", "pro-launch", "gpt-5.5"} <= set(BOOK.names)
    for name in BOOK.names:
        found = BOOK.price(name, at("2026-11-23T12:00"))
        assert found.source and found.miss < found.output and found.hit <= found.miss


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_costs_are_exact(hit: int, miss: int, output: int) -> None:
    found = BOOK.price("pro", at("2026-05-01T00:00"))
    expected = (Fraction("0.003625") * hit + Fraction("0.435") * miss + Fraction("0.87") * output) / 10**6
    assert Fraction(found.cost(hit, miss, output)) == expected


def test_break_even_of_an_agentic_load() -> None:
    assert machine_price(3.75, 489) == pytest.approx(2.13, abs=0.005)
    shares = [break_even(3.75, 489, BOOK.price("flash", at(when)), 60_840, 6_760, 400) for when in
              ("2026-11-23T12:00", "2026-11-23T02:00")]  # fmt: skip
    assert shares == pytest.approx([0.593, 0.297], abs=0.001)


OWN = '[[ours]]\nhit = 0\nmiss = 1.5\noutput = {output}\nsource = "ourselves"\n'


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the file of own prices; every later look sees the change."""
    monkeypatch.setattr(price, "_RECHECK", 0.0)
    file = tmp_path / "prices.toml"

    def write(text: str) -> Path:
        file.write_text(text, "utf-8")
        os.utime(file, ns=(0, write.__dict__.setdefault("count", 0)))
        write.__dict__["count"] += 1
        return file

    return write


def test_own_lists_stand_beside_the_packaged_ones_and_change_with_their_file(own: Callable[[str], Path]) -> None:
    book = PriceBook.load(own(OWN.format(output=2)))
    assert {"ours", "flash"} <= set(book.names)
    assert book.price("ours", at("2026-11-23T12:00")) == Price(Decimal(0), Decimal("1.5"), Decimal(2), "ourselves")
    own(OWN.format(output=3))
    assert book.price("ours", at("2026-11-23T12:00")).output == 3
    assert book.problem is None


@pytest.mark.parametrize(
    ("text", "said"), [("[[ours]", "is not TOML"), ("", "no longer has the price list 'ours'"), ("ours = 1", "tables")]
)
def test_a_broken_file_keeps_the_former_prices_and_is_reported(
    own: Callable[[str], Path], text: str, said: str
) -> None:
    book = PriceBook.load(own(OWN.format(output=2)))
    own(text)
    assert book.price("ours", at("2026-11-23T12:00")).output == 2
    assert said in str(book.problem) and "former prices" in str(book.problem)
    own(OWN.format(output=4))
    assert book.price("ours", at("2026-11-23T12:00")).output == 4
    assert book.problem is None


def test_a_file_that_vanishes_keeps_the_former_prices(own: Callable[[str], Path]) -> None:
    file = own(OWN.format(output=2))
    book = PriceBook.load(file)
    file.unlink()
    assert book.price("ours", at("2026-11-23T12:00")).output == 2
    assert "cannot read" in str(book.problem)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[a]]\nhit = 1\nmiss = 1\n", "`output` must be a number"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = true\n", "`output` must be a number"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = -1\n", "from 0 to 999999"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = nan\n", "from 0 to 999999"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 0.0000001\n", "at most 6 decimals"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 1\nouput = 2\n", "unknown key 'ouput'"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 1\nfrom = 2026-01-01\n", "with its zone"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 1\nsource = 3\n", "`source` must be a text"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 1\n[[a]]\nhit = 1\nmiss = 1\noutput = 1\n", "reorder"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 1\npeak = 2\n", "`peak` must be a table"),
        ("[[a]]\nhit = 1\nmiss = 1\noutput = 1\n[a.peak]\nhit = 2\nmiss = 2\noutput = 2\n", "needs `hours`"),
        (
            '[[a]]\nhit = 1\nmiss = 1\noutput = 1\n[a.peak]\nhit = 2\nmiss = 2\noutput = 2\nhours = ["22:00-02:00"]\n',
            "spans of one day",
        ),
    ],
)
def test_a_list_that_cannot_be_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(PriceError, match="list 'a'") as refused:
        PriceBook.load(file)
    assert said in str(refused.value)


def test_an_unknown_list_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PriceError, match=r"known are .*flash"):
        BOOK.price("flashy", at("2026-11-23T12:00"))
