"""API keys: secrets that only their owner holds, limits, and a view in memory that follows the database."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hadal.accounts import tables
from hadal.accounts.tables import AccountsError, cause, to_dollars, to_pico

PERIODS = ("day", "month", "total")
_SIGN = "sk-hadal-"
_COUNTS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens")


@dataclass(frozen=True)
class Limits:
    """What a key may use, None without limit; `budget` (USD) and `tokens` hold per day or month in UTC, or in total."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    budget: Decimal | None = None
    tokens: int | None = None
    period: str = "month"

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "budget"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63 / (tables.PICO if name == "budget" else 1):
                raise AccountsError(f"limit {name} cannot be {value}; give a number from 0 up")
        if self.period not in PERIODS:
            raise AccountsError(f"unknown period {self.period!r}; take {', '.join(PERIODS)}")


@dataclass(frozen=True)
class Key:
    """An API key without its secret."""

    id: str
    name: str
    prefix: str  # the first characters of the secret
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    limits: Limits = field(default_factory=Limits)


class Keys:
    """All keys of a database; `find` answers from memory, `refresh` brings the memory up to date."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._version: int | None = -1
        self._by_hash: dict[str, tuple[str, Key]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._by_hash)

    def find(self, secret: str) -> Key | None:
        """The valid key with this secret; None when it is unknown, revoked or expired."""
        digest = _digest(secret)
        stored, key = self._by_hash.get(digest, ("", None))
        if not hmac.compare_digest(stored, digest) or key is None or key.revoked:
            return None
        return None if key.expires and key.expires.timestamp() <= self._clock() else key

    def list(self) -> list[Key]:
        """Every key ever made, the oldest first; raises AccountsError when the database is away."""
        try:
            self.refresh()
        except SQLAlchemyError as error:
            raise AccountsError(f"cannot read the keys ({cause(error)}); try again") from None
        return sorted((key for _, key in self._by_hash.values()), key=lambda key: (key.created, key.id))

    def create(self, name: str, limits: Limits | None = None, expires: datetime | None = None) -> tuple[Key, str]:
        """Make a key; the secret is returned here and nowhere else. Raises AccountsError when the name is in use."""
        if not 0 < len(name) <= 200 or not name.isprintable():
            raise AccountsError("the name of a key has 1 to 200 printable characters; give another")
        secret = _SIGN + secrets.token_urlsafe(32)
        row = {
            "id": f"key-{uuid.uuid4().hex[:12]}", "name": name, "hash": _digest(secret),
            "prefix": secret[: len(_SIGN) + 4], "created": self._now(), "expires": expires and _millis(expires),
            **_columns(limits or Limits()),
        }  # fmt: skip
        try:
            self._change(sa.insert(tables.keys).values(row))
        except IntegrityError:
            raise AccountsError(f"a key named {name!r} is in use; revoke it or take another name") from None
        return self._by_hash[row["hash"]][1], secret

    def revoke(self, name: str) -> Key:
        """Make the key with this name or id useless from now on; raises AccountsError when there is none."""
        key = self._named(name)
        self._change(sa.update(tables.keys).where(tables.keys.c.id == key.id).values(revoked=self._now()))
        return self._by_id(key.id)

    def limit(self, name: str, **changes: Any) -> Key:
        """Change some limits of the key with this name or id; raises AccountsError when there is none."""
        key = self._named(name)
        limits = dataclasses.replace(key.limits, **changes)
        self._change(sa.update(tables.keys).where(tables.keys.c.id == key.id).values(_columns(limits)))
        return self._by_id(key.id)

    def refresh(self) -> None:
        """Read the keys again if any has changed."""
        with self._engine.connect() as connection:
            version = connection.execute(sa.select(tables.meta.c.value).where(tables.meta.c.name == "keys")).scalar()
            if version == self._version:
                return
            rows = connection.execute(sa.select(tables.keys)).all()
        self._by_hash, self._version = {row.hash: (row.hash, _key(row)) for row in rows}, version

    def _change(self, statement: Any) -> None:
        try:
            with self._engine.begin() as connection:
                tables.add(connection, tables.meta, [{"name": "keys", "value": 1}], "value")
                connection.execute(statement)
            self.refresh()
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise AccountsError(f"cannot change the keys ({cause(error)}); try again") from None

    def _named(self, name: str) -> Key:
        for key in self.list():
            if name in (key.id, key.name) and not key.revoked:
                return key
        raise AccountsError(f"no key in use is named {name!r}; `hadal keys list` shows them")

    def _by_id(self, id: str) -> Key:
        return next(key for _, key in self._by_hash.values() if key.id == id)

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _millis(when: datetime) -> int:
    return int(when.timestamp() * 1000)


def _time(millis: int | None) -> datetime | None:
    return None if millis is None else datetime.fromtimestamp(millis / 1000, UTC)


def _columns(limits: Limits) -> dict[str, Any]:
    budget = None if limits.budget is None else to_pico(limits.budget)
    return {name: getattr(limits, name) for name in _COUNTS} | {"budget": budget, "period": limits.period}


def _key(row: Row[Any]) -> Key:
    budget = None if row.budget is None else to_dollars(row.budget)
    limits = Limits(**{name: getattr(row, name) for name in _COUNTS}, budget=budget, period=row.period)
    created = _time(row.created)
    assert created is not None
    return Key(row.id, row.name, row.prefix, created, _time(row.expires), _time(row.revoked), limits)
