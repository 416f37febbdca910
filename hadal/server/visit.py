"""Visit: the account of one request from arrival to end; ledger, metrics, logs and traces are written from it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from hadal.accounts import Key
from hadal.server.wire import Usage


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the key, or None where none is needed."""

    key: Key | None = None

    def tenant(self, user_id: str | None) -> str:
        """Prefixes and remembered turns are shared within a tenant only: a key's end user."""
        return f"{self.key.id if self.key else ''}/{user_id or ''}"


@dataclass(slots=True)
class Visit:
    """One request. Moments are of time.monotonic; `received` is of the wall clock. It ends exactly once."""

    api: str  # chat, completions, responses, messages or batch
    caller: Caller
    model: str = ""
    stream: bool = False
    user_id: str | None = None
    priority: int = 0
    batch: str | None = None  # the batch that it belongs to
    show_cost: bool = False
    traceparent: str | None = None  # the caller's span, as W3C spells it
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    received: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # when the engine first gave it a state
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    turns: int = 0  # earlier answers in the conversation
    usage: Usage | None = None
    cost: Decimal | None = None  # in USD
    cache_reason: str = ""  # "hit", or why no prefix was found
    finish_reason: str = ""  # of the first answer
    malformed: int = 0  # tool call blocks that came back as text
    on_gap: Callable[[float, int], None] | None = None  # told of seconds between pieces, and tokens of the later one
    status: int = 200
    error: str | None = None  # the code of the APIError that ended it

    def saw(self, tokens: int) -> None:
        """Note that so many tokens came now."""
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
        elif self.last_token is not None and self.on_gap is not None:
            self.on_gap(now - self.last_token, tokens)
        self.last_token = now


Observer = Callable[[Visit], None]  # told of every visit at its end
