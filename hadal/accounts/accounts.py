"""Accounts: keys, limits, ledger and prices of one server behind one object."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import sqlalchemy as sa

from hadal.accounts import ledger as book_keeping
from hadal.accounts import tables
from hadal.accounts.keys import Key, Keys
from hadal.accounts.ledger import Ledger, UsageRow
from hadal.accounts.limits import Gate, Hold, periods
from hadal.accounts.tables import AccountsError, cause, to_pico
from hadal.accounts.usage import Usage, sum_usage
from hadal.plan.price import PriceBook

PRICE_LIST = "flash-launch"


@dataclass(frozen=True)
class Balance:
    """What a caller may still spend: `left` in USD, None without a budget."""

    is_available: bool
    left: Decimal | None


class Accounts:
    """Keys, limits and the ledger in one database, SQLite in the data folder unless `url` says otherwise.

    Changes that other processes make (keys, limits, spending) count here within two seconds. Several servers may share
    a database: requests, tokens and money are then limited together, requests under way in each server for itself, and
    what another server has under way is seen when it ends. Raises AccountsError when the database cannot be opened and
    PriceError for an unknown `price_list`. `find`, `enter`, `record`, `cost` and `balance` never wait for the database.
    """

    def __init__(
        self,
        url: str | None = None,
        book: PriceBook | None = None,
        price_list: str = PRICE_LIST,
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.book = book or PriceBook.load()
        self._clock = clock
        self.price_list = price_list
        folder = folder or tables.data_folder()
        self.database = tables.open_database(url or sa.URL.create("sqlite", database=str(folder / "hadal.db")))
        try:
            self.keys = Keys(self.database, clock)
            self._gate = Gate(clock)
            self._load([], list)
        except sa.exc.SQLAlchemyError as error:
            raise AccountsError(f"cannot read the accounts ({cause(error)}); check the database") from None
        spool = tables.spool_of(self.database, folder)
        self._ledger = Ledger(self.database, spool, self._gate.lock, self._follow)
        self._ledger.start()

    @property
    def price_list(self) -> str:
        """The list that requests are priced at; setting one that has no price now raises PriceError."""
        return self._price_list

    @price_list.setter
    def price_list(self, name: str) -> None:
        self.book.price(name, self._now())
        self._price_list = name

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever made, so that callers need one."""
        return len(self.keys) > 0

    @property
    def healthy(self) -> bool:
        """Whether rows can be made durable; `problem` says why not."""
        return self._ledger.healthy

    @property
    def problem(self) -> str | None:
        """One sentence on what is wrong with the ledger or the prices, or None."""
        return self._ledger.problem or self.book.problem

    def find(self, secret: str) -> Key | None:
        """The valid key with this secret; None when it is unknown, revoked or expired."""
        return self.keys.find(secret)

    def enter(self, key: Key | None, tokens: int, output: int = 0) -> Hold:
        """Begin a request of `tokens` prompt tokens and at most `output` answered ones; raises LimitReached.

        The hold must be left in any case, after the row of the request was recorded.
        """
        if key is None:
            return Hold()
        return self._gate.enter(key, tokens, output, self.cost(0, tokens, output, self._now()))

    def record(self, row: UsageRow) -> Future[None]:
        """Keep a row; the future is done when the row is durable and fails with AccountsError when it cannot be."""
        with self._gate.lock:
            future = self._ledger.record(row)
            if row.key is not None:
                self._gate.spend(row.key, row.time, row.hit + row.miss, row.output, to_pico(row.cost))
        return future

    def cost(self, hit: int, miss: int, output: int, when: datetime) -> Decimal:
        """USD for these numbers of tokens at `when` (aware) on the price list in use."""
        return self.book.price(self.price_list, when).cost(hit, miss, output)

    def balance(self, key: Key | None) -> Balance:
        """What the key may still spend in its period."""
        left = None if key is None else self._gate.left(key)
        return Balance(left is None or left > 0, left)

    def usage(
        self, since: datetime | None = None, until: datetime | None = None, by: tuple[str, ...] = ()
    ) -> list[Usage]:
        """Sums over the ledger; see `sum_usage`."""
        return sum_usage(self.database, since, until, by)

    def close(self) -> None:
        """Write what waits and let go of the database."""
        self._ledger.close()
        self.database.dispose()

    def __enter__(self) -> Accounts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self) -> None:
        """Take over what other processes changed; runs in the ledger's thread, so no row is half written."""
        self.keys.refresh()
        self._load(book_keeping.others(self.database, self._ledger.server), self._ledger.unsaved)

    def _load(self, elsewhere: list[tuple[str, int, int, int]], waiting: Callable[[], list[UsageRow]]) -> None:
        table, now = tables.totals.c, self._now()
        query = sa.select(table.period, table.key, table.tokens, table.cost).where(table.period.in_(periods(now)))
        with self.database.connect() as connection:
            totals = [(period, key, tokens, cost) for period, key, tokens, cost in connection.execute(query)]
        with self._gate.lock:
            unsaved = [
                (row.key, row.time, row.hit + row.miss + row.output, to_pico(row.cost)) for row in waiting() if row.key
            ]
            self._gate.load(totals, elsewhere, unsaved)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)
