"""Store: what is known of clients' files and batches, in the accounts' database, and where their bytes lie."""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.exc import SQLAlchemyError

from hadal.accounts.tables import cause, insert_new, ledger, lock, name_of
from hadal.server.errors import APIError

OPEN = ("validating", "in_progress", "finalizing", "cancelling")  # what a batch is before its end
KINDS = ("output", "error")  # of files that a batch makes
MOMENTS = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")

_NAMESPACE = uuid.UUID("6f1d9d0c-54a5-4d4e-9b55-8ac0b2f0d6a1")


def _columns(kind: type[Any], *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind) for name in names]


def _owned() -> list[sa.Column[Any]]:
    return [
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("key", sa.String, nullable=False, index=True),  # its id, or nothing
        sa.Column("created", sa.BigInteger, nullable=False),  # microseconds since 1970, so that pages have an order
    ]


_metadata = sa.MetaData()
files = sa.Table(
    "files",
    _metadata,
    *_owned(),
    *_columns(sa.String, "purpose", "filename"),
    *_columns(sa.BigInteger, "bytes", "expires"),  # seconds since 1970
)
batches = sa.Table(
    "batches",
    _metadata,
    *_owned(),
    sa.Column("status", sa.String, nullable=False, index=True),
    *_columns(sa.String, "endpoint", "input_file_id", "output_file_id", "error_file_id"),
    *_columns(sa.BigInteger, *(f"{name}_at" for name in MOMENTS)),
    *_columns(sa.BigInteger, "total", "succeeded", "erred", "output_seconds"),
    *_columns(sa.JSON, "metadata", "errors", "usage"),
)


class Store:
    """Rows of files and batches, each seen by its own key only, and in `folder` the bytes of this database's files.

    Methods wait for the database: call them in a thread. They raise APIError: 404 for an id that the key does not have,
    503 while the database does not answer.
    """

    def __init__(self, database: Engine, data: Path, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.folder = data / f"files-{name_of(database, data)}"
        self._database = database

    @cached_property
    def _ready(self) -> Engine:
        with self._database.begin() as connection:
            lock(connection)
            _metadata.create_all(connection)
        return self._database

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie."""
        return self.folder / file_id

    def stamp(self, kind: str) -> dict[str, Any]:
        """A new id and the moment, for a row."""
        return {"id": f"{kind}{uuid.uuid4().hex}", "created": int(self.clock() * 1e6)}

    def add(self, table: sa.Table, row: Mapping[str, Any], most: int, what: str) -> None:
        """Insert a row; 429 when its key has `most` already, of batches those that have not ended."""
        counted = sa.select(sa.func.count()).where(table.c.key == row["key"], self._live(table))
        if table is batches:
            counted = counted.where(table.c.status.in_(OPEN))
        with self._begin() as connection:
            lock(connection)
            if connection.execute(counted.select_from(table)).scalar_one() >= most:
                raise APIError(429, f"there are {most} {what} already, which is the limit; {_REMEDY[table.name]}")
            connection.execute(sa.insert(table).values(**row))

    def get(self, table: sa.Table, key: str, id: str) -> Row[Any]:
        """The row with this id."""
        query = sa.select(table).where(table.c.id == id, table.c.key == key, self._live(table))
        row = None
        if id.isascii() and id.isprintable():  # a database may not even look up others
            with self._begin() as connection:
                row = connection.execute(query).one_or_none()
        if row is None:
            raise APIError(
                404, f"there is no {_NAME[table.name]} {id[:80]!r} here; it may have expired or been deleted"
            )
        return row

    def page(
        self, table: sa.Table, key: str, after: str | None, limit: int, *, descending: bool = True, **equal: str
    ) -> dict[str, Any]:
        """OpenAI's list of rows, the newest first unless told otherwise, from behind the one with id `after`."""
        order = sa.tuple_(table.c.created, table.c.id)
        query = sa.select(table).where(table.c.key == key, self._live(table))
        query = query.where(*(table.c[name] == value for name, value in equal.items()))
        if after is not None:
            last = self.get(table, key, after)
            mark = sa.tuple_(sa.literal(last.created), sa.literal(last.id))
            query = query.where(order < mark if descending else order > mark)
        columns = (table.c.created, table.c.id)
        query = query.order_by(*(c.desc() if descending else c.asc() for c in columns)).limit(limit + 1)
        with self._begin() as connection:
            rows = connection.execute(query).all()
        data = [SHOWN[table.name](row) for row in rows[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, "has_more": len(rows) > limit} | ends

    def remove_file(self, key: str, id: str) -> None:
        """Forget a file and delete its bytes; 409 while a batch reads it."""
        self.get(files, key, id)
        if not self._forget(files.c.id == id):
            raise APIError(409, f"file {id} is the input of a batch that has not ended; cancel that first")

    def remove_expired(self) -> None:
        """Forget the files whose time has come, unless a batch reads them."""
        self._forget(sa.not_(self._live(files)))

    def all_files(self) -> set[str]:
        """Ids of everybody's files, those included that batches are writing."""
        with self._begin() as connection:
            known = set(connection.execute(sa.select(files.c.id)).scalars())
        return known | {made_id(row.id, kind) for row in self.open_batches() for kind in KINDS}

    def open_batches(self) -> Sequence[Row[Any]]:
        """Everybody's batches that have not ended, the oldest first."""
        query = sa.select(batches).where(batches.c.status.in_(OPEN)).order_by(batches.c.created, batches.c.id)
        with self._begin() as connection:
            return connection.execute(query).all()

    def change(self, id: str, since: Sequence[str], status: str, **values: Any) -> bool:
        """Bring a batch that is in one of the statuses `since` to `status`; False when it was not."""
        values[f"{status}_at"] = int(self.clock())
        which = (batches.c.id == id, batches.c.status.in_(since))
        with self._begin() as connection:
            return connection.execute(sa.update(batches).where(*which).values(status=status, **values)).rowcount > 0

    def count(self, id: str, succeeded: int, erred: int) -> None:
        """Note how many lines of a batch are done; what its end has noted stays."""
        which = (batches.c.id == id, batches.c.status.in_(OPEN))
        with self._begin() as connection:
            connection.execute(sa.update(batches).where(*which).values(succeeded=succeeded, erred=erred))

    def end(self, id: str, status: str, made: Sequence[Mapping[str, Any]], **values: Any) -> None:
        """End a batch together with the files that it made."""
        values[f"{status}_at"] = int(self.clock())
        with self._begin() as connection:
            for row in made:
                insert_new(connection, files, [dict(row)])
            which = batches.c.id == id
            values["usage"] = _usage(connection, id, sa.select(batches.c.created // 1000 - 60_000).where(which))
            connection.execute(sa.update(batches).where(which).values(status=status, **values))

    def _forget(self, which: Any) -> int:
        used = sa.select(batches.c.input_file_id).where(batches.c.status.in_(OPEN))
        gone = sa.delete(files).where(which, files.c.id.not_in(used)).returning(files.c.id)
        with self._begin() as connection:
            ids = connection.execute(gone).scalars().all()
        for id in ids:
            self.path(id).unlink(missing_ok=True)
        return len(ids)

    def _live(self, table: sa.Table) -> Any:
        return sa.true() if table is batches else sa.func.coalesce(files.c.expires, 2**62) > int(self.clock())

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._ready.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise APIError(
                503, f"files and batches cannot be looked up now ({cause(error)}); try again later", retry_after=5
            ) from error


def made_id(batch_id: str, kind: str) -> str:
    """The id of a batch's "output" or "error" file, known before there is one."""
    return f"file-{uuid.uuid5(_NAMESPACE, f'{batch_id} {kind}').hex}"


def show_file(row: Row[Any]) -> dict[str, Any]:
    """A file in OpenAI's shape."""
    return {
        "id": row.id, "object": "file", "bytes": row.bytes, "created_at": row.created // 10**6,
        "expires_at": row.expires, "filename": row.filename, "purpose": row.purpose, "status": "processed",
    }  # fmt: skip


def show_batch(row: Row[Any]) -> dict[str, Any]:
    """A batch in OpenAI's shape."""
    files_of = ("input_file_id", "output_file_id", "error_file_id")
    alike = ("id", "endpoint", "status", *files_of, *(f"{name}_at" for name in MOMENTS), "metadata", "usage")
    return {name: row._mapping[name] for name in alike} | {
        "object": "batch", "completion_window": "24h", "created_at": row.created // 10**6,
        "errors": row.errors and {"object": "list", "data": row.errors},
        "request_counts": {"total": row.total, "completed": row.succeeded, "failed": row.erred},
    }  # fmt: skip


@contextmanager
def on_disk() -> Iterator[None]:
    """Say what a full or broken disk means for the request."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the server's disk is full; delete files that are not needed, or try again later"
        raise APIError(
            507 if full else 503,
            reason if full else f"the file cannot be kept or read now ({cause(error)}); try again later",
            code="insufficient_storage" if full else None,
        ) from error


def _usage(connection: Connection, id: str, since: Any) -> dict[str, Any]:
    """What the ledger says of a batch's requests, in OpenAI's shape; what the server failed on does not count."""
    table = ledger.c
    sums = (
        sa.func.coalesce(sa.func.sum(column), 0) for column in (table.hit, table.miss, table.output, table.reasoning)
    )
    query = sa.select(*sums).where(table.batch == id, table.time >= since.scalar_subquery(), table.status < 500)
    hit, miss, output, reasoning = map(int, connection.execute(query).one())
    return {
        "input_tokens": hit + miss, "input_tokens_details": {"cached_tokens": hit}, "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": reasoning}, "total_tokens": hit + miss + output,
    }  # fmt: skip


SHOWN: Mapping[str, Callable[[Row[Any]], dict[str, Any]]] = {"files": show_file, "batches": show_batch}
_NAME = {"files": "file", "batches": "batch"}
_REMEDY = {"files": "delete some that are not needed", "batches": "wait until one has ended"}
