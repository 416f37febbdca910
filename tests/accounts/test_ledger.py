"""The ledger when things go wrong: killed processes, locked, full and absent databases, damaged files."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from hadal.accounts import Accounts, AccountsError, UsageRow, tables
from hadal.accounts.keys import Keys
from tests.accounts.test_keys import soon

Open = Callable[..., Accounts]
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def row(id: str, **fields: object) -> UsageRow:
    return UsageRow(id, NOW, "chat", "nano", **{"miss": 1, "cost": Decimal("0.5")} | fields)


def record(accounts: Accounts, *ids: str, seconds: float = 10) -> None:
    for future in [accounts.record(row(id)) for id in ids]:
        future.result(seconds)


def sums(accounts: Accounts) -> tuple[int, Decimal, int]:
    """Requests and cost by the ledger, and trillionths by the totals."""
    (one,) = accounts.usage()
    with accounts.database.connect() as connection:
        query = sa.select(tables.totals.c.cost).where(tables.totals.c.period == "total")
        return one.requests, one.cost, connection.execute(query).scalar_one()


@contextmanager
def locked(file: Path):
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    """A process that opens accounts in `folder` and runs `body`."""
    code = f"""
        import sys, time, itertools
        from datetime import UTC, datetime
        from pathlib import Path
        from hadal.accounts import Accounts, AccountsError, UsageRow
        accounts = Accounts(folder=Path({str(folder)!r}))
        def row(id):
            return UsageRow(id, datetime.now(UTC), "chat", "nano", miss=1)
    """
    command = [sys.executable, "-c", textwrap.dedent(code) + textwrap.dedent(body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


WRITE = """
    for step in itertools.count():
        ids = [f"{step}-{number}" for number in range(20)]
        futures = [accounts.record(row(id)) for id in ids]
        for id, future in zip(ids, futures):
            future.result()
            print(id, flush=True)
"""


def told(process: subprocess.Popen[str], count: int) -> list[str]:
    """Ids that the process said were safe, at least `count` of them; it is killed without warning."""
    assert process.stdout
    ids = [process.stdout.readline().strip() for _ in range(count)]
    process.send_signal(signal.SIGKILL)
    return ids + [line.strip() for line in process.stdout if line.endswith("\n")]


def test_a_killed_process_loses_no_row_that_was_safe(tmp_path: Path, opened: Open, rows_of) -> None:
    safe = told(start(tmp_path, WRITE), 300)
    accounts = opened()
    kept = rows_of(f"sqlite:///{tmp_path / 'hadal.db'}")
    assert len(safe) >= 300 and set(safe) <= set(kept)
    assert sums(accounts)[0] == len(kept)


def test_a_process_killed_while_the_database_is_locked_loses_none_either(tmp_path: Path, opened: Open, rows_of) -> None:
    opened().close()
    with locked(tmp_path / "hadal.db"):
        safe = told(start(tmp_path, WRITE), 300)
    assert len(list((tmp_path / "hadal.db-spool").iterdir())) > 1
    opened()
    assert soon(lambda: set(safe) <= set(rows_of(f"sqlite:///{tmp_path / 'hadal.db'}")), 10)


def test_many_streams_share_commits(opened: Open) -> None:
    accounts, commits = opened(), []
    sa.event.listen(accounts.database, "commit", lambda connection: commits.append(1))
    barrier = threading.Barrier(8)

    def stream(number: int) -> None:
        barrier.wait()
        record(accounts, *(f"{number}-{step}" for step in range(250)))

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums(accounts) == (2000, 1000, 1000 * tables.PICO)
    assert len(commits) < 200


def test_recording_never_waits_for_the_database(tmp_path: Path, opened: Open) -> None:
    accounts = opened()
    record(accounts, "first")
    with locked(tmp_path / "hadal.db"):
        began = time.monotonic()
        future = accounts.record(row("second"))
        accounts.enter(None, 1).leave()
        assert accounts.balance(None) and accounts.find("x") is None
        assert time.monotonic() - began < 0.1
        future.result(10)


def test_a_locked_database_gets_its_rows_later_exactly_once(tmp_path: Path, opened: Open) -> None:
    accounts = opened()
    record(accounts, "a")
    with locked(tmp_path / "hadal.db"):
        record(accounts, "b")
        record(accounts, "c", "d", "d")
        assert accounts.healthy and "is locked" in str(accounts.problem)
        assert sums(accounts)[0] == 1
    assert soon(lambda: accounts.problem is None and sums(accounts)[0] == 4, 5)
    record(accounts, "e", "a")
    assert sums(accounts) == (5, Decimal("2.5"), 5 * tables.PICO // 2)
    assert list((tmp_path / "hadal.db-spool").iterdir()) == []


def test_money_in_the_spool_counts_against_the_budget(tmp_path: Path, opened: Open) -> None:
    accounts = opened()
    key, _ = accounts.keys.create("alice")
    key = accounts.keys.limit("alice", budget=Decimal(2))
    with locked(tmp_path / "hadal.db"):
        spent = UsageRow("a", datetime.now(UTC), "chat", "nano", key.id, cost=Decimal("0.5"))
        accounts.record(spent).result(10)
        time.sleep(1.5)
        assert accounts.balance(key).left == Decimal("1.5")
    assert soon(lambda: accounts.problem is None, 5)
    time.sleep(1.2)
    assert accounts.balance(key).left == Decimal("1.5")


def test_a_spool_taken_in_before_a_crash_is_taken_in_once(tmp_path: Path, opened: Open) -> None:
    accounts, spool, copy = opened(), tmp_path / "hadal.db-spool", tmp_path / "copy"
    with locked(tmp_path / "hadal.db"):
        record(accounts, "a", "b")
        shutil.copytree(spool, copy)
    assert soon(lambda: sums_or_none(accounts) == (2, 1, tables.PICO), 5)
    accounts.close()
    shutil.copytree(copy, spool, dirs_exist_ok=True)  # as if the process had died between commit and removal
    again = opened()
    assert soon(lambda: not list(spool.iterdir()), 5)
    assert sums(again) == (2, 1, tables.PICO)


def sums_or_none(accounts: Accounts) -> tuple[int, Decimal, int] | None:
    return sums(accounts) if accounts.usage() else None


def test_a_damaged_spool_file_is_put_aside_and_the_others_are_taken_in(tmp_path: Path, opened: Open) -> None:
    accounts, spool = opened(), tmp_path / "hadal.db-spool"
    with locked(tmp_path / "hadal.db"):
        record(accounts, "a")
        (spool / "0.jsonl").write_text('{"id": "b"')
    assert soon(lambda: sums_or_none(accounts) is not None, 5)
    assert [file.name for file in spool.iterdir()] == ["0.damaged"]
    record(accounts, "c")


def spooled(**fields: object) -> str:
    whole = {name: value for name, value in vars(row("b")).items()} | {"recorded": 1, "server": "s"}
    return json.dumps(whole | {"time": 10**12, "cost": 1} | fields)


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", "7", "[" * 10**5, spooled(more=1), spooled(id=None), spooled(time="now"), spooled(time=10**18),
     spooled(cost=1.5), spooled(miss=True), spooled(output=2**70), spooled(user="\0"), spooled(user="\ud800")],
)  # fmt: skip
def test_no_spool_file_stops_the_ledger(opened: Open, url: str, tmp_path: Path, text: str) -> None:
    accounts = opened(url)
    spool = tables.spool_of(accounts.database, tmp_path)
    spool.mkdir()
    (spool / "1.jsonl").mkdir()
    for name, line in (("0", text), ("2", spooled())):
        (spool / "part").write_text(line + "\n")
        (spool / "part").rename(spool / f"{name}.jsonl")
    assert soon(lambda: {file.name for file in spool.iterdir()} == {"0.damaged", "1.damaged"}, 10)
    assert soon(lambda: sums_or_none(accounts) is not None, 10)
    assert accounts.healthy and accounts.problem is None and accounts.usage()[0].requests == 1
    secret = Keys(accounts.database, time.time).create("alice")[1]  # as another process would
    assert soon(lambda: accounts.find(secret) is not None, 10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_ledger_whose_thread_has_ended_is_not_healthy(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = opened()
    monkeypatch.setattr(accounts.keys, "refresh", lambda: 1 / 0)
    assert soon(lambda: not accounts.healthy, 10)
    assert "thread has ended" in str(accounts.problem)


def test_rows_that_nothing_can_keep_fail_and_health_comes_back(tmp_path: Path, opened: Open) -> None:
    accounts, spool = opened(), tmp_path / "hadal.db-spool"
    spool.write_text("a file where the folder should be")
    with locked(tmp_path / "hadal.db"):
        with pytest.raises(AccountsError, match="cannot keep rows"):
            record(accounts, "lost")
        assert not accounts.healthy and "locked" in str(accounts.problem)
        spool.unlink()
        record(accounts, "a")
        assert accounts.healthy
    assert soon(lambda: accounts.problem is None and bool(accounts.usage()), 5)
    assert sums(accounts)[0] == 1


FULL = """
    import resource
    def room(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    def attempt(id):
        try:
            accounts.record(row(id)).result(10)
            return "kept"
        except AccountsError:
            return "refused"
    said = [attempt("a")]
    room(0)  # no file can grow any more, which writes meet as they meet a full disk
    said += [attempt("b"), accounts.healthy]
    room(resource.RLIM_INFINITY)
    end = time.monotonic() + 5
    while not accounts.healthy and time.monotonic() < end:
        time.sleep(0.05)
    said += [accounts.healthy, attempt("c")]
    print(*said, flush=True)
    accounts.close()
"""


def test_a_full_disk_refuses_rows_and_is_left_behind(tmp_path: Path, rows_of) -> None:
    process = start(tmp_path, FULL)
    assert process.communicate(timeout=60)[0].split() == ["kept", "refused", "False", "True", "kept"]
    assert rows_of(f"sqlite:///{tmp_path / 'hadal.db'}") == ["a", "c"]


def test_a_database_server_that_goes_away_gets_its_rows_later(postgresql, opened: Open) -> None:
    url = postgresql.create("goes_away")
    accounts = opened(url)
    key, secret = accounts.keys.create("alice")
    record(accounts, "a")
    postgresql.stop()
    try:
        record(accounts, "b", "c")
        record(accounts, "d")
        assert accounts.healthy and accounts.find(secret) == key
        with pytest.raises(AccountsError, match="cannot read"):
            accounts.usage()
        with pytest.raises(AccountsError, match="cannot read the keys"):
            accounts.keys.revoke("alice")
    finally:
        postgresql.start()
    assert soon(lambda: accounts.problem is None and sums(accounts) == (4, 2, 2 * tables.PICO), 10)


def test_rows_of_one_database_never_reach_another(postgresql, opened: Open, tmp_path: Path) -> None:
    first, second = (tables.open_database(postgresql.create(name)) for name in ("one", "two"))
    assert tables.spool_of(first, tmp_path) != tables.spool_of(second, tmp_path)
    first.dispose(), second.dispose()


@pytest.mark.parametrize("text", ["nul \0 inside", "\ud800", "x" * 10**6, "'; drop table ledger; --"])
def test_strange_texts_do_not_stop_the_ledger(opened: Open, url: str, text: str) -> None:
    accounts = opened(url)
    accounts.record(row("a", user=text, batch=text)).result(10)
    (one,) = accounts.usage(by=("user",))
    assert one.requests == 1 and len(one.group["user"]) <= 512


def test_an_answer_that_nobody_awaits_is_recorded_all_the_same(opened: Open) -> None:
    accounts = opened()

    async def client() -> None:
        waiting = asyncio.wrap_future(accounts.record(row("a")))
        waiting.cancel()
        await asyncio.wrap_future(accounts.record(row("b")))

    asyncio.run(client())
    assert sums(accounts)[0] == 2


def test_closing_writes_what_waits_and_then_takes_no_more(tmp_path: Path, opened: Open, rows_of) -> None:
    accounts = opened()
    futures: list[Future[None]] = [accounts.record(row(f"{number:03}")) for number in range(700)]
    accounts.close()
    assert all(future.done() for future in futures)
    assert len(rows_of(f"sqlite:///{tmp_path / 'hadal.db'}")) == 700
    with pytest.raises(AccountsError, match="closed"):
        accounts.record(row("late"))
