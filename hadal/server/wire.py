"""Wire: one response in the shape of one API, told event by event or whole; each API's module has its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from hadal.llm import CompletionOutput, Delta, Generation
from hadal.server.ask import Ask
from hadal.server.errors import APIError
from hadal.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; a text is sent as it is."""

    data: dict[str, Any] | str
    name: str | None = None

    def encode(self) -> bytes:
        """The bytes of the event stream."""
        data = self.data if isinstance(self.data, str) else dump(self.data)
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {data}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole response, over all of its answers; `hit` of the prompt tokens were found in the cache.

    `reasoning` of the `output` tokens were spent on thinking. `cost` in USD is there when the client asked to see it.
    """

    prompt: int
    hit: int
    output: int
    reasoning: int
    cost: Decimal | None = None

    def to_openai(self) -> dict[str, Any]:
        """DeepSeek's usage object, which is OpenAI's with the cache's two sums."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_cache_hit_tokens": self.hit,
            "prompt_cache_miss_tokens": self.prompt - self.hit,
            "prompt_tokens_details": {"cached_tokens": self.hit},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }
        return usage | self.extra()

    def extra(self) -> dict[str, Any]:
        """What a usage object of any shape has beyond its API: the cost, when it was asked for."""
        return {} if self.cost is None else {"cost": f"{self.cost:f}", "cost_currency": "USD"}


@dataclass(frozen=True, slots=True)
class Context:
    """What a Wire is made of. `generations` holds the answers-to-be, all samples of a prompt side by side."""

    id: str  # 32 hex digits, unique
    created: int  # Unix seconds
    ask: Ask
    generations: Sequence[Generation]
    tokenizer: Tokenizer


class Wire(Protocol):
    """One response. `index` counts answers; all of `feed` is in order for an answer, and answers interleave.

    `usage` is None until the very last delta of the response, which comes when its row in the ledger is safe.
    """

    done: str | None  # the data of a last event after everything, errors too
    keep_alive: bytes  # what keeps a connection open while nothing can be told

    def opening(self) -> list[Event]:
        """The events before any delta."""

    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        """The events that tell a delta; none when it holds nothing to tell."""

    def failed(self, error: APIError) -> list[Event]:
        """The events that end a stream that cannot go on."""

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        """The finished response in one piece; `feed` is not called for it."""


MakeWire = Callable[[Context], Wire]
COMMENT = b": keep-alive\n\n"


# Line ends to many clients' line readers, though not to the event stream's standard.
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def dump(value: Any) -> str:
    """Compact JSON on one line, whoever reads it; half surrogates, which no UTF-8 can carry, become escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if text.isascii():
        return text
    return text.translate(_LINE_ENDS) if _encodable(text) else json.dumps(value, separators=(",", ":"))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
