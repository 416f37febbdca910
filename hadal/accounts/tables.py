"""The database of accounts: its tables, how it is opened, and how an older one is brought forward."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

PICO = 10**12  # money is stored in whole trillionths of a dollar: exact for any price list
_LOCK = 0x6861_6461  # the number of PostgreSQL's advisory lock


class AccountsError(ValueError):
    """The accounts cannot be opened, read or written."""


_metadata = sa.MetaData()
meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
keys = sa.Table(
    "keys",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False, unique=True),
    sa.Column("prefix", sa.String, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),  # times are milliseconds since 1970
    sa.Column("expires", sa.BigInteger),
    sa.Column("revoked", sa.BigInteger),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("concurrent", sa.BigInteger),
    sa.Column("budget", sa.BigInteger),
    sa.Column("tokens", sa.BigInteger),
    sa.Column("period", sa.String, nullable=False),
)
sa.Index(
    "keys_in_use", keys.c.name, unique=True, sqlite_where=keys.c.revoked.is_(None),
    postgresql_where=keys.c.revoked.is_(None),
)  # fmt: skip
ledger = sa.Table(
    "ledger",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False, index=True),
    sa.Column("recorded", sa.BigInteger, nullable=False, index=True),
    sa.Column("server", sa.String, nullable=False),
    sa.Column("key", sa.String),
    *(sa.Column(name, sa.String, nullable=False) for name in ("user", "tenant", "api", "model")),
    sa.Column("priority", sa.BigInteger, nullable=False),
    sa.Column("batch", sa.String),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("hit", "miss", "output", "reasoning")),
    sa.Column("first_token_s", sa.Double),
    sa.Column("total_s", sa.Double, nullable=False),
    sa.Column("finish_reason", sa.String),
    sa.Column("status", sa.BigInteger, nullable=False),
    sa.Column("price_list", sa.String, nullable=False),
    sa.Column("cost", sa.BigInteger, nullable=False),
)
# What each key has used in each day, month and ever, so that a limit never needs a sum over the ledger.
totals = sa.Table(
    "totals",
    _metadata,
    sa.Column("period", sa.String, primary_key=True),  # 2026-11-23, 2026-11 or total
    sa.Column("key", sa.String, primary_key=True),  # empty for requests without a key
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("cost", sa.BigInteger, nullable=False),
)

# Step n brings a database of version n to n + 1; steps are only ever appended.
_STEPS: list[Callable[[Connection], None]] = [_metadata.create_all]


def data_folder() -> Path:
    """Where Hadal keeps its data: `$HADAL_DATA` or `hadal` in the user's data home."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(os.environ.get("HADAL_DATA") or Path(home) / "hadal")


def open_database(url: str | sa.URL) -> Engine:
    """Connect to `url`, creating or bringing forward its tables; raises AccountsError when that fails."""
    try:
        at = sa.make_url(url)
    except ArgumentError:
        raise AccountsError(f"{url!r} is no database URL; write sqlite:///FILE or postgresql://HOST/NAME") from None
    shown = at.render_as_string(hide_password=True)
    try:
        engine = _sqlite(at) if at.get_backend_name() == "sqlite" else _postgresql(at)
        with engine.connect() as connection:
            known = _version(connection)
        if known != len(_STEPS):
            with engine.begin() as connection:
                _bring_forward(connection)
    except (SQLAlchemyError, OSError) as error:
        raise AccountsError(f"cannot open the accounts in {shown} ({cause(error)}); check the URL") from None
    return engine


def spool_of(engine: Engine, folder: Path) -> Path:
    """Where rows wait for this database and no other: beside its file, or in `folder` when it is on a server."""
    if engine.dialect.name == "sqlite":
        return Path(f"{Path(engine.url.database or '').absolute()}-spool")
    return folder / f"spool-{name_of(engine, folder)}"


def name_of(engine: Engine, folder: Path) -> str:
    """12 hex digits for this database and no other; a file within `folder` keeps them when the folder is moved."""
    at = engine.url
    sqlite = engine.dialect.name == "sqlite"
    at_home = sqlite and os.path.relpath(os.path.realpath(at.database or ""), os.path.realpath(folder))
    where = at_home or f"{at.host}:{at.port}/{at.database}"
    return hashlib.sha256(where.encode()).hexdigest()[:12]


def lock(connection: Connection) -> None:
    """Let no other process change the schema, nor whatever else is locked so, until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    else:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def insert_new(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> set[str]:
    """Insert the rows whose id is not there yet and return the ids inserted."""
    statement = _insert(connection, table).on_conflict_do_nothing().returning(table.c.id)
    return set(connection.execute(statement, rows).scalars())


def add(connection: Connection, table: sa.Table, rows: Iterable[dict[str, Any]], *columns: str) -> None:
    """Insert rows; where the primary key is there already, add the values of `columns` to it."""
    statement = _insert(connection, table)
    summed = {name: table.c[name] + statement.excluded[name] for name in columns}
    statement = statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=summed)
    for row in rows:
        connection.execute(statement, row)


def to_pico(dollars: Decimal) -> int:
    """USD as whole trillionths, rounded up."""
    return -int(-(dollars * PICO) // 1)


def to_dollars(pico: int) -> Decimal:
    """USD of whole trillionths."""
    return Decimal(int(pico)).scaleb(-12)


def cause(error: BaseException) -> str:
    """One line that says what a database or the disk complained about."""
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _insert(connection: Connection, table: sa.Table) -> Any:
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def _sqlite(at: sa.URL) -> Engine:
    if not at.database or at.database == ":memory:":
        raise AccountsError("accounts need a file to outlast the server; write sqlite:///FILE")
    Path(at.database).absolute().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = sa.create_engine(at, connect_args={"timeout": 1.0})

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns

    return engine


def _postgresql(at: sa.URL) -> Engine:
    if at.get_backend_name() != "postgresql":
        raise AccountsError(f"accounts cannot live in {at.get_backend_name()}; use sqlite:// or postgresql://")
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise AccountsError("PostgreSQL needs its driver; pip install 'psycopg[binary]'") from None
    at = at.set(drivername="postgresql+psycopg")
    limits = "-c statement_timeout=30000 -c lock_timeout=2000 -c synchronous_commit=on"
    given = {"connect_timeout": 3, "tcp_user_timeout": 5000, "options": limits}
    return sa.create_engine(at, connect_args=given, pool_pre_ping=True)


def _version(connection: Connection) -> int:
    if not sa.inspect(connection).has_table("meta"):
        return 0
    return connection.execute(sa.select(meta.c.value).where(meta.c.name == "schema")).scalar() or 0


def _bring_forward(connection: Connection) -> None:
    lock(connection)  # of several servers that start at once, one does the work and the others wait
    meta.create(connection, checkfirst=True)
    add(connection, meta, [{"name": "schema", "value": 0}], "value")
    version = _version(connection)
    if version > len(_STEPS):
        raise AccountsError(f"the accounts were written by a newer Hadal (schema {version}); update Hadal")
    for step in _STEPS[version:]:
        step(connection)
    connection.execute(sa.update(meta).where(meta.c.name == "schema").values(value=len(_STEPS)))
