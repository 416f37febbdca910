"""The ledger: one row per request, durable before its client sees the end, whatever happens to the database.

One thread writes all rows that wait as one commit. While the database is locked, away or full, rows go to the spool:
one file per commit, complete and on the disk before it gets its name, and taken into the database when that is back. A
row may be taken in twice, by two servers or after a crash, and counts once, because its id is the primary key.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from hadal.accounts import tables
from hadal.accounts.limits import periods
from hadal.accounts.tables import AccountsError, cause, to_pico

_log = logging.getLogger("hadal.accounts")
_BATCH = 500  # rows in one commit
_FILES = 50  # spool files taken in by one commit
_TICK = 1.0  # seconds between two looks at the spool and at what other servers wrote
_LONGEST_TEXT = 512


@dataclass(frozen=True)
class UsageRow:
    """What one request used: tokens, seconds, USD; `key` is the id of its key, None without one."""

    id: str
    time: datetime  # of arrival, aware
    api: str
    model: str
    key: str | None = None
    user: str = ""
    tenant: str = ""
    priority: int = 0
    batch: str | None = None
    hit: int = 0
    miss: int = 0
    output: int = 0
    reasoning: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    finish_reason: str | None = None
    status: int = 200
    price_list: str = ""
    cost: Decimal = Decimal(0)


class Ledger:
    """Keeps rows; `each_second` runs in its thread while the database answers and the spool is empty."""

    def __init__(self, engine: Engine, spool: Path, lock: threading.Condition, each_second: Callable[[], None]) -> None:
        self.server = uuid.uuid4().hex
        self._engine = engine
        self._spool = spool
        self._wake = lock
        self._each_second = each_second
        self._queue: deque[tuple[UsageRow, Future[None]]] = deque()
        self._closing = False
        self._away: str | None = None  # why the database takes no rows
        self._lost: str | None = None  # why the spool takes none either
        self._thread = threading.Thread(target=self._run, name="hadal-ledger", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether rows can be kept, in the database or in the spool."""
        return self._lost is None and self._thread.is_alive()

    @property
    def problem(self) -> str | None:
        """One sentence on what is wrong, or None."""
        if not self._thread.is_alive():
            return "the ledger's thread has ended and no row is kept; see the log and start the server again"
        if self._lost:
            return f"the ledger cannot keep rows: the database says {self._away}, the spool {self._lost}; make room"
        return self._away and f"the ledger waits for its database ({self._away}); rows are kept in {self._spool}"

    def record(self, row: UsageRow) -> Future[None]:
        """Keep a row; the future is done when the row is durable and fails with AccountsError when it cannot be."""
        assert row.time.tzinfo
        future: Future[None] = Future()
        with self._wake:
            if self._closing:
                raise AccountsError("the ledger is closed; record rows before that")
            self._queue.append((row, future))
            self._wake.notify_all()
        return future

    def unsaved(self) -> list[UsageRow]:
        """Rows that wait to be written."""
        with self._wake:
            return [row for row, _ in self._queue]

    def close(self) -> None:
        """Write what waits and stop."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing, max(0.0, due - time.monotonic()))
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH))]
                closing = self._closing
            if batch:
                self._keep(batch)
            elif closing:
                return
            if time.monotonic() >= due:
                due = time.monotonic() + (0 if self._catch_up() else _TICK)

    def _keep(self, batch: list[tuple[UsageRow, Future[None]]]) -> None:
        failure: AccountsError | None = None
        rows = [self._stored(row) for row, _ in batch]
        if self._away is None:
            try:
                self._store(rows)
            except SQLAlchemyError as error:
                self._is_away(error)
        if self._away is not None:
            try:
                self._set_aside(rows)
                self._lost = None
            except OSError as error:
                self._lost = cause(error)
                failure = AccountsError(str(self.problem))
                _log.error("%s", failure)
        for _, future in batch:
            if future.set_running_or_notify_cancel():
                future.set_exception(failure) if failure else future.set_result(None)

    def _stored(self, row: UsageRow) -> dict[str, Any]:
        texts = {
            name: value.encode("utf-8", "replace").decode().replace("\0", "")[:_LONGEST_TEXT]
            for name, value in asdict(row).items()
            if isinstance(value, str)
        }
        when = {"time": int(row.time.timestamp() * 1000), "recorded": int(time.time() * 1000)}
        return asdict(row) | texts | when | {"server": self.server, "cost": to_pico(row.cost)}

    def _store(self, rows: list[dict[str, Any]]) -> None:
        with self._engine.begin() as connection:
            new = tables.insert_new(connection, tables.ledger, rows)
            sums: dict[tuple[str, str], tuple[int, int]] = {}
            for row in rows:
                if row["id"] not in new:
                    continue
                new.remove(row["id"])
                for period in periods(datetime.fromtimestamp(row["time"] / 1000, UTC)):
                    tokens, cost = sums.get((period, row["key"] or ""), (0, 0))
                    used = row["hit"] + row["miss"] + row["output"]
                    sums[period, row["key"] or ""] = (tokens + used, cost + row["cost"])
            added = [
                {"period": period, "key": key, "tokens": tokens, "cost": cost}
                for (period, key), (tokens, cost) in sorted(sums.items())  # one order for all, so that none deadlock
            ]
            tables.add(connection, tables.totals, added, "tokens", "cost")

    def _set_aside(self, rows: list[dict[str, Any]]) -> None:
        self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._spool / f"{time.time_ns():020d}-{self.server}.jsonl"
        unnamed = file.with_suffix(".part")
        try:
            with unnamed.open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
                out.flush()
                os.fsync(out.fileno())
            unnamed.replace(file)
        except OSError:
            unnamed.unlink(missing_ok=True)
            raise
        folder = os.open(self._spool, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _catch_up(self) -> bool:
        """Take in the spool and what other servers wrote; whether more waits in the spool."""
        try:
            if self._away is not None:
                with self._engine.begin() as connection:  # a write of nothing shows whether the database takes rows
                    tables.add(connection, tables.meta, [{"name": "schema", "value": 0}], "value")
                _log.warning("the ledger's database takes rows again")
                self._away = self._lost = None
            files = sorted(self._spool.glob("*.jsonl"))
            if files:
                self._take_in(files[:_FILES])
            if len(files) > _FILES:
                return True
            self._each_second()
        except SQLAlchemyError as error:
            self._is_away(error)
        except OSError as error:
            _log.error("the spool in %s cannot be taken in (%s); look at its permissions", self._spool, cause(error))
        return False

    def _take_in(self, files: list[Path]) -> None:
        rows = []
        for file in files:
            try:
                rows += [_read_row(line) for line in file.read_text("utf-8").splitlines()]
            except FileNotFoundError:  # another server has taken it in
                continue
            except (ValueError, TypeError, OverflowError, RecursionError, IsADirectoryError) as error:
                _log.error("%s is damaged (%s) and kept under the name .damaged", file, error)
                file.rename(file.with_suffix(".damaged"))
        if rows:
            self._store(rows)
        for file in files:
            file.unlink(missing_ok=True)

    def _is_away(self, error: Exception) -> None:
        if self._away is None:
            _log.warning("the ledger's database takes no rows (%s); they go to %s", cause(error), self._spool)
        self._away = cause(error)


def _read_row(line: str) -> dict[str, Any]:
    """A row as the spool keeps it; ValueError and the like for anything that the database would stumble over."""
    row = json.loads(line)
    columns = tables.ledger.c
    if not isinstance(row, dict) or row.keys() != set(columns.keys()):
        raise ValueError("a line has other columns than the ledger")
    for name, value in row.items():
        kind = columns[name].type.python_type
        if (value is None and columns[name].nullable) or (type(value) is int and kind is float):
            continue
        if type(value) is not kind or "\0" in str(value).encode().decode() or (kind is int and abs(value) >> 62):
            raise ValueError(f"{name!r} cannot be {str(value)[:80]!r}")
    datetime.fromtimestamp(row["time"] / 1000, UTC)
    return row


def others(engine: Engine, server: str) -> list[tuple[str, int, int, int]]:
    """(key, second, requests, tokens) that other servers recorded in the last minute."""
    table, since = tables.ledger.c, int((time.time() - 60) * 1000)
    second = (table.recorded // 1000).label("second")
    tokens = sa.func.sum(table.hit + table.miss + table.output)
    query = (
        sa.select(table.key, second, sa.func.count(), tokens)
        .where(table.recorded > since, table.server != server, table.key.is_not(None))
        .group_by(table.key, second)
    )
    with engine.connect() as connection:
        return [(key, int(at), requests, int(used)) for key, at, requests, used in connection.execute(query)]
