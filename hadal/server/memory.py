"""TurnMemory: answers of earlier requests, so that a conversation comes back as the model wrote it.

Clients send whole conversations, many without the reasoning and all without the tokens. Between the API and the chat
codec, this puts both back into turns that were made here; worker threads call it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from hadal.llm import CompletionOutput
from hadal.text import SAMPLED_KEY, SampledTurn

Messages = Sequence[Mapping[str, Any]]
_Call = tuple[str, str]  # name, and arguments in one spelling of their JSON

_ENTRY_BYTES = 4096  # of a turn besides its texts and ids, as a process of many short turns grows by


class HistoryError(ValueError):
    """Earlier turns that strict history refuses; the message names the message and what it lacks."""


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    reasoning: str
    content: str
    calls: tuple[_Call, ...]
    sampled: SampledTurn | None
    keys: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        texts = {id(text): sys.getsizeof(text) for text in (self.reasoning, self.content)}
        ids = 0
        if self.sampled is not None:
            texts |= {id(text): sys.getsizeof(text) for text in (self.sampled.reasoning, self.sampled.answer)}
            ids = 4 * (len(self.sampled.reasoning_ids) + len(self.sampled.answer_ids))
        return (
            _ENTRY_BYTES + ids + sum(texts.values()) + sum(sys.getsizeof(text) for call in self.calls for text in call)
        )


class TurnMemory:
    """Turns within `limit_bytes`, the least recently used go first; thread-safe.

    A turn is found by the id of one of its calls, which nobody can guess, or by all that was said up to and including
    it, by whom, with which calls. Of the turns that recalled conversations had, `replayed` counts those that got their
    tokens back, `repaired` those that got their reasoning back, `unknown` those that were not found.
    """

    def __init__(self, *, limit_bytes: int = 128 << 20) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._turns: OrderedDict[_Turn, None] = OrderedDict()
        self._by_key: dict[bytes, _Turn] = {}
        self.nbytes = 0
        self.replayed = self.repaired = self.unknown = 0

    def remember(
        self, tenant: str, messages: Messages, output: CompletionOutput, sampled: SampledTurn | None = None
    ) -> None:
        """Keep a finished answer to `messages` (as the client sent them); one that was broken off is not kept."""
        if output.finish_reason not in ("stop", "length", "tool_calls") or _is_prefix(messages[-1]):
            return
        calls = [call.to_dict() for call in output.tool_calls]
        place = _root(tenant)
        for message in (*messages, {"role": "assistant", "content": output.text, "tool_calls": calls}):
            place = _extend(place, message)
        keys = (place, *(_call_key(tenant, call.id) for call in output.tool_calls))
        turn = _Turn(output.reasoning or "", output.text, _calls({"tool_calls": calls}), sampled, keys)
        if turn.nbytes > self._limit:
            return
        with self._lock:
            before = self._by_key.get(place)
            if before is not None and len(before.keys) == 1:
                self._drop(before)
            self._turns[turn] = None
            self._by_key |= dict.fromkeys(keys, turn)
            self.nbytes += turn.nbytes
            while self.nbytes > self._limit:
                self._drop(next(iter(self._turns)))

    def recall(
        self,
        tenant: str,
        messages: Messages,
        *,
        thinking: bool = True,
        tools: bool = False,
        strict: bool = False,
        synthetic: bool = False,
    ) -> list[Mapping[str, Any]]:
        """The conversation with what is known of its assistant turns: tokens where nothing was changed, lost reasoning.

        `strict` with `tools` while `thinking` raises HistoryError for an assistant turn that came without its
        reasoning_content, unless it was made here without any (a stream tells no empty one, so clients have none to
        send back), and with `synthetic` unless its calls were never made here. Nothing else fails.
        """
        demands, place, recalled = strict and tools and thinking, _root(tenant), []
        for i, message in enumerate(messages):
            place = _extend(place, message)
            if not isinstance(message, Mapping) or message.get("role") != "assistant" or _is_prefix(message):
                recalled.append(message)
                continue
            turn = self._find([*(_call_key(tenant, call_id) for call_id in _call_ids(message)), place])
            sent = message.get("reasoning_content")
            excused = synthetic and bool(_calls(message)) if turn is None else not turn.reasoning
            if demands and sent is None and not excused:
                raise HistoryError(
                    f"messages[{i}] (assistant) has no reasoning_content; while thinking, a request with tools must "
                    "send back the reasoning_content (thinking blocks, reasoning items) of all assistant messages"
                )
            recalled.append(message if turn is None else self._complete(message, turn, thinking))
        return recalled

    def _find(self, keys: Sequence[bytes]) -> _Turn | None:
        with self._lock:
            turn = next((self._by_key[key] for key in keys if key in self._by_key), None)
            if turn is None:
                self.unknown += 1
            else:
                self._turns.move_to_end(turn)
            return turn

    def _complete(self, message: Mapping[str, Any], turn: _Turn, thinking: bool) -> Mapping[str, Any]:
        # An empty reasoning counts as lost: clients send one to satisfy servers that insist on the key.
        sent, added = message.get("reasoning_content"), dict[str, Any]()
        if not sent and turn.reasoning and thinking:
            added["reasoning_content"] = turn.reasoning
        same = _text(message.get("content")) == turn.content and _calls(message) == turn.calls
        if same and turn.sampled is not None and (not sent or sent == turn.reasoning):
            added[SAMPLED_KEY] = turn.sampled
        with self._lock:
            self.repaired += "reasoning_content" in added
            self.replayed += SAMPLED_KEY in added
        return {**message, **added} if added else message

    def _drop(self, turn: _Turn) -> None:
        del self._turns[turn]
        self.nbytes -= turn.nbytes
        for key in turn.keys:
            if self._by_key.get(key) is turn:
                del self._by_key[key]


def _is_prefix(message: Any) -> bool:
    """Whether it is the start of an answer, no turn of its own."""
    return isinstance(message, Mapping) and bool(message.get("prefix"))


def _root(tenant: str) -> bytes:
    return _digest(b"", "tenant", tenant)


def _call_key(tenant: str, call_id: str) -> bytes:
    return _digest(_root(tenant), "call", call_id)


def _extend(place: bytes, message: Any) -> bytes:
    """The digest of a conversation with one more message."""
    if not isinstance(message, Mapping):
        return _digest(place, repr(message))
    said = _text(message.get("content"))
    return _digest(place, "message", str(message.get("role")), said, *(part for c in _calls(message) for part in c))


def _digest(start: bytes, *parts: str) -> bytes:
    digest = blake2b(start, digest_size=16)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _text(content: Any) -> str:
    """Content as the chat codec reads it; what it refuses has any text of its own."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [
        part["text"] for part in _listed(content) if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    ]
    return "\n\n".join(texts) if isinstance(content, list) and len(texts) == len(content) else repr(content)


def _functions(message: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for call in _listed(message.get("tool_calls")):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield call, function


def _call_ids(message: Mapping[str, Any]) -> list[str]:
    return [call["id"] for call, _ in _functions(message) if isinstance(call.get("id"), str)]


def _calls(message: Mapping[str, Any]) -> tuple[_Call, ...]:
    return tuple(
        (str(function.get("name")), _one_spelling(function.get("arguments"))) for _, function in _functions(message)
    )


def _one_spelling(arguments: Any) -> str:
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return repr(arguments)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
