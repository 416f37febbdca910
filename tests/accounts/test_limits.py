"""Limits with a clock of their own, against plain recounts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.accounts import Accounts, Hold, Key, LimitReached, Limits, UsageRow
from hadal.accounts.limits import Gate

Open = Callable[..., Accounts]
START = datetime(2026, 11, 30, 23, 0, tzinfo=UTC).timestamp()  # an hour before a day and a month end


def key(**limits: object) -> Key:
    return Key("key-1", "alice", "sk-hadal-", datetime.fromtimestamp(START, UTC), limits=Limits(**limits))


@dataclass
class Stage:
    """A gate under a clock that the test moves."""

    now: float = START
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(lambda: self.now)

    def enter(self, key: Key, tokens: int = 0, output: int = 0, cost: str = "0") -> Hold:
        return self.gate.enter(key, tokens, output, Decimal(cost))

    def refused(self, key: Key, tokens: int = 0, output: int = 0, cost: str = "0") -> LimitReached:
        with pytest.raises(LimitReached) as refused:
            self.enter(key, tokens, output, cost)
        return refused.value

    def spend(self, key: Key, prompt: int = 0, output: int = 0, cost: str = "0") -> None:
        when = datetime.fromtimestamp(self.now, UTC)
        self.gate.spend(key.id, when, prompt, output, int(Decimal(cost).scaleb(12)))


def test_requests_under_way_are_limited_until_one_leaves() -> None:
    stage, two = Stage(), key(concurrent=2)
    first, _ = stage.enter(two), stage.enter(two)
    refused = stage.refused(two)
    assert (refused.status, refused.retry_after) == (429, 1.0)
    first.leave()
    first.leave()  # once is enough
    stage.enter(two)
    assert stage.refused(two).status == 429


@given(
    limit=st.integers(1, 6),
    steps=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 3)), max_size=40),
)
def test_no_minute_sees_more_than_the_limit(limit: int, steps: list[tuple[float, int]]) -> None:
    for limits, count in ((key(requests_per_minute=limit), False), (key(tokens_per_minute=limit), True)):
        stage, passed = Stage(), []
        for wait, tokens in steps:
            stage.now += wait
            more = tokens if count else 1
            try:
                stage.enter(limits, tokens)
                passed.append((stage.now, more))
            except LimitReached as refused:
                lately = sum(n for at, n in passed if at > stage.now - 61)
                assert lately + more > limit, "refused without need"
                if refused.retry_after is None:
                    assert more > limit
                    continue
                assert refused.retry_after <= 61
                stage.now += refused.retry_after
                stage.enter(limits, tokens)  # as promised
                passed.append((stage.now, more))
            window = sum(n for at, n in passed if at > stage.now - 60)
            assert window <= limit


def test_answered_tokens_count_when_they_are_recorded() -> None:
    stage, limits = Stage(), key(tokens_per_minute=100)
    stage.enter(limits, 40, output=10**6).leave()
    stage.spend(limits, prompt=40, output=50)
    stage.enter(limits, 10)
    refused = stage.refused(limits, 1)
    assert 60 <= refused.retry_after <= 61
    assert stage.refused(limits, 101).retry_after is None


def test_several_answers_at_once_fit_at_their_largest_and_one_alone_always() -> None:
    stage, limits = Stage(), key(tokens_per_minute=100)
    large = stage.enter(limits, 30, output=10**6)  # no answer needs to be cut short for the limit's sake
    later = stage.refused(limits, 1)
    assert (later.status, later.retry_after) == (429, 1.0) and "under way" in str(later)
    stage.spend(limits, prompt=30, output=5)
    large.leave()
    first, _ = stage.enter(limits, 10, output=20), stage.enter(limits, 10, output=15)
    assert stage.refused(limits, 1, output=10).retry_after == 1.0
    first.leave()  # of 20 it needed none
    stage.enter(limits, 1, output=10)
    stage.now += 61  # the prompts have left the minute, the answers under way are still to come
    assert stage.refused(limits, 1, output=75).retry_after == 1.0
    stage.enter(limits, 1, output=74)


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 120), st.floats(0, 1), st.booleans()),
        max_size=60,
    )
)
def test_a_minute_goes_beyond_its_tokens_by_one_answer_at_most(
    steps: list[tuple[int, int, int, float, bool]],
) -> None:
    stage, limits, largest = Stage(), key(tokens_per_minute=100), 120
    under_way: list[tuple[Hold, int]] = []
    uses: list[tuple[float, int]] = []
    for wait, tokens, output, share, ends in steps:
        stage.now += wait
        if ends and under_way:
            hold, most = under_way.pop(0)
            stage.spend(limits, output=int(most * share))
            uses.append((stage.now, int(most * share)))
            hold.leave()
        else:
            alone, recent = not under_way, sum(n for at, n in uses if at > stage.now - 61)
            try:
                under_way.append((stage.enter(limits, tokens, output), output))
                uses.append((stage.now, tokens))
            except LimitReached:
                assert recent + tokens + (0 if alone else output + sum(n for _, n in under_way)) > 100
        assert sum(n for at, n in uses if at > stage.now - 60) <= 100 + largest


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "end"]), st.integers(0, 60), st.decimals(0, 4, places=3), st.floats(0, 1)),
        max_size=60,
    )
)
def test_a_budget_is_never_exceeded_whatever_runs_at_once(steps: list[tuple[str, int, Decimal, float]]) -> None:
    stage, limits = Stage(), key(budget=Decimal(10), tokens=1000)
    under_way: list[tuple[Hold, Decimal, int]] = []
    spent, used = Decimal(0), 0
    for kind, tokens, cost, share in steps:
        if kind == "enter":
            reserved, held = sum(c for _, c, _ in under_way), sum(t for *_, t in under_way)
            fits = spent + reserved + cost <= 10 and used + held + 2 * tokens <= 1000
            try:
                under_way.append((stage.enter(limits, tokens, tokens, str(cost)), cost, 2 * tokens))
                assert fits
            except LimitReached as refused:
                assert not fits
                hopeless = spent + cost > 10 or used + 2 * tokens > 1000
                assert refused.status == (402 if hopeless else 429)
        elif under_way:
            hold, most, most_tokens = under_way.pop(0)
            real = round(most * Decimal(share), 12)
            prompt = int(most_tokens * share)
            stage.spend(limits, prompt, 0, str(real))
            hold.leave()
            spent, used = spent + real, used + prompt
        assert spent <= 10 and used <= 1000
        assert stage.gate.left(limits) == 10 - spent


@pytest.mark.parametrize(
    ("period", "renewed"), [("day", "2026-12-01T00:00"), ("month", "2026-12-01T00:00"), ("total", None)]
)
def test_a_budget_is_renewed_with_its_period(period: str, renewed: str | None) -> None:
    stage, limits = Stage(), key(budget=Decimal(1), period=period)
    stage.spend(limits, cost="1")
    refused = stage.refused(limits, cost="0.01")
    assert refused.status == 402 and "used up" in str(refused)
    border = datetime.fromisoformat(renewed or "2036-01-01T00:00").replace(tzinfo=UTC).timestamp()
    stage.now = border - 1
    assert stage.refused(limits, cost="0.01").status == 402
    stage.now = border
    if renewed:
        stage.enter(limits, cost="1")
    else:
        assert stage.refused(limits, cost="0.01").status == 402


def test_the_refusal_says_what_is_left_and_what_to_do() -> None:
    stage, limits = Stage(), key(budget=Decimal(1), period="day")
    stage.spend(limits, cost="0.75")
    assert str(stage.refused(limits, cost="0.5")) == (
        "this key's budget of $1 for 2026-11-30 (UTC) has $0.25 left and this request may need $0.5; lower max_tokens"
    )
    stage.enter(limits, cost="0.25")
    later = stage.refused(limits, cost="0.25")
    assert (later.status, later.retry_after) == (429, 1.0)


def test_what_the_database_holds_replaces_what_was_known_but_not_what_waits() -> None:
    stage, limits = Stage(), key(budget=Decimal(1), requests_per_minute=3)
    now = datetime.fromtimestamp(stage.now, UTC)
    stage.spend(limits, cost="0.5")
    stage.gate.load(
        [("2026-11", "key-1", 0, 6 * 10**11)], [("key-1", int(stage.now), 2, 0)], [("key-1", now, 0, 10**11)]
    )
    assert stage.gate.left(limits) == Decimal("0.3")
    stage.enter(limits)
    assert stage.refused(limits).status == 429


def test_without_a_key_nothing_is_limited(opened: Open) -> None:
    accounts = opened()
    holds = [accounts.enter(None, 10**9, 10**9) for _ in range(100)]
    for hold in holds:
        hold.leave()
    assert accounts.balance(None).is_available and accounts.balance(None).left is None


def test_two_servers_share_money_and_rates_through_the_ledger(opened: Open, url: str) -> None:
    here, there = opened(url), opened(url)
    alice, secret = here.keys.create("alice", Limits(budget=Decimal(1), requests_per_minute=3))
    now = datetime.now(UTC)
    hold = here.enter(alice, 10)
    here.record(UsageRow("r1", now, "chat", "m", alice.id, miss=10, cost=Decimal("0.6"))).result(10)
    hold.leave()
    assert here.balance(alice).left == Decimal("0.4")
    end = time.monotonic() + 20
    while there.balance(alice).left != Decimal("0.4") and time.monotonic() < end:
        time.sleep(0.02)
    assert there.balance(there.find(secret)).left == Decimal("0.4")
    there.enter(alice, 1), there.enter(alice, 1)
    with pytest.raises(LimitReached, match="3 requests per minute"):
        there.enter(alice, 1)
