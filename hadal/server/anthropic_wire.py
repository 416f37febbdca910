"""AnthropicWire: an answer as the content blocks and events of Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hadal.llm import CompletionOutput, Delta
from hadal.server.errors import APIError
from hadal.server.wire import Context, Event, Usage

# Clients drop thinking blocks without a signature. Blocks are taken back whatever theirs is, so it need say nothing.
SIGNATURE = "hadal"
_BLOCKS = {"thinking": {"thinking": "", "signature": ""}, "text": {"text": ""}}


class AnthropicWire:
    """Tells reasoning, text and calls as blocks, each kind in the order in which the model writes it."""

    done: str | None = None
    keep_alive = b'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, context: Context) -> None:
        (self._generation,) = context.generations
        self._message: dict[str, Any] = {
            "id": f"msg_{context.id}", "type": "message", "role": "assistant", "model": context.ask.model,
            "content": [], "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip
        self._index = 0  # of the block being told, or of the next
        self._kind = ""  # of the block being told, "" between blocks

    def opening(self) -> list[Event]:
        """The message before its content; what of the prompt is cached is known at the end."""
        usage = _usage(Usage(len(self._generation.request.prompt_ids), 0, 0, 0))
        return [_event("message_start", message=self._message | {"usage": usage})]

    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        """The events of a delta; those of the last one end the message."""
        return list(self._tell(delta, usage))

    def failed(self, error: APIError) -> list[Event]:
        """The error."""
        return [Event(error.anthropic_body, "error")]

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        """The message in one piece."""
        (output,) = outputs
        content: list[dict[str, Any]] = []
        if output.reasoning:
            content.append({"type": "thinking", "thinking": output.reasoning, "signature": SIGNATURE})
        if output.text:
            content.append({"type": "text", "text": output.text})
        for call in output.tool_calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
        return self._message | {"content": content} | self._stop(output.finish_reason) | {"usage": _usage(usage)}

    def _tell(self, delta: Delta, usage: Usage | None) -> Iterator[Event]:
        for kind, piece in (("thinking", delta.reasoning), ("text", delta.text)):
            if piece:
                if self._kind != kind:
                    yield from self._begin(kind, _BLOCKS[kind])
                yield self._more(f"{kind}_delta", kind, piece)
        for call in delta.tool_calls:
            yield from self._begin("tool_use", {"id": call.id, "name": call.name, "input": {}})
            yield self._more("input_json_delta", "partial_json", call.arguments)
        if usage is not None:
            yield from self._end()
            yield _event("message_delta", delta=self._stop(delta.finish_reason), usage=_usage(usage))
            yield _event("message_stop")

    def _begin(self, kind: str, empty: dict[str, Any]) -> Iterator[Event]:
        yield from self._end()
        self._kind = kind
        yield _event("content_block_start", index=self._index, content_block={"type": kind} | empty)

    def _end(self) -> Iterator[Event]:
        if not self._kind:
            return
        if self._kind == "thinking":
            yield self._more("signature_delta", "signature", SIGNATURE)
        yield _event("content_block_stop", index=self._index)
        self._kind = ""
        self._index += 1

    def _more(self, kind: str, field: str, piece: str) -> Event:
        return _event("content_block_delta", index=self._index, delta={"type": kind, field: piece})

    def _stop(self, finish_reason: str | None) -> dict[str, Any]:
        """Why it ended: the context's end is told apart from the limit that was asked for."""
        request, matched = self._generation.request, self._generation.matched_stop
        most = request.params.max_tokens
        reason = {"tool_calls": "tool_use", "length": "max_tokens"}.get(finish_reason or "", "end_turn")
        if reason == "max_tokens" and most is not None and request.limit < most:
            reason = "model_context_window_exceeded"
        if reason == "end_turn" and matched is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was read from the cache apart from the other input."""
    return {
        "input_tokens": usage.prompt - usage.hit,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.hit,
        "output_tokens": usage.output,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    } | usage.extra()


def _event(kind: str, **data: Any) -> Event:
    return Event({"type": kind} | data, kind)
