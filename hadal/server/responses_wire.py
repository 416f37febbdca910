"""ResponsesWire: an answer as the items and numbered events of OpenAI's Responses API."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hadal.llm import CompletionOutput, Delta, ToolCall
from hadal.server.errors import APIError
from hadal.server.logprobs import chat_logprobs
from hadal.server.wire import COMMENT, Context, Event, Usage

# Clients that keep no reasoning in the clear, as Codex, send it back in this form, which hides nothing.
SEALED = "hadal-reasoning:"
_KINDS = {"reasoning": ("rs", "reasoning_text"), "message": ("msg", "output_text")}


class ResponsesWire:
    """Tells reasoning, text and calls as items, each kind in the order in which the model writes it.

    `shown` are fields of the request that the response repeats. `calls` has, by a tool's name in the prompt, what the
    item of its call says of it: type, name, namespace. `seal` adds to reasoning items the form in which clients carry
    them back.
    """

    done: str | None = None
    keep_alive = COMMENT

    def __init__(
        self, context: Context, shown: Mapping[str, Any], calls: Mapping[str, dict[str, str]], *, seal: bool
    ) -> None:
        self._context, self._calls, self._seal = context, calls, seal
        (self._generation,) = context.generations
        params = self._generation.request.params
        self._head = {
            "id": f"resp_{context.id}", "object": "response", "created_at": context.created, "model": context.ask.model,
            "background": False, "instructions": None, "metadata": {}, "tools": [], "tool_choice": "auto",
            "parallel_tool_calls": context.ask.parallel_tool_calls, "previous_response_id": None,
            "service_tier": "default", "store": False,
            "temperature": params.temperature, "top_p": params.top_p, "max_output_tokens": params.max_tokens,
            "text": {"format": {"type": "text"}}, "truncation": "disabled",
        } | dict(shown)  # fmt: skip
        self._head["reasoning"] = {"effort": context.ask.effort if context.ask.thinking else "none", "summary": None}
        self._sent = 0
        self._items: list[dict[str, Any]] = []  # as they are when done
        self._kind = ""  # of the item being told, "" between items
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []  # of the message being told
        self._untold: list[dict[str, Any]] = []  # of tokens whose text has not come out yet

    def opening(self) -> list[Event]:
        """The response before any item."""
        return [self._event(name, response=self._response("in_progress")) for name in ("created", "in_progress")]

    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        """The events of a delta; those of the last one end the response."""
        return list(self._tell(delta, usage))

    def failed(self, error: APIError) -> list[Event]:
        """The response with its error."""
        return [self._event("failed", response=self._response("failed", error=error))]

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        """The response that the events would have told."""
        (output,) = outputs
        logprobs = tuple(output.logprobs or ())[self._generation.reasoning_tokens :]
        everything = Delta(
            output.text, output.reasoning or "", tuple(output.tool_calls), (), logprobs, 0, output.finish_reason
        )
        *_, last = self._tell(everything, usage)
        assert isinstance(last.data, dict)
        response: dict[str, Any] = last.data["response"]
        return response

    def _tell(self, delta: Delta, usage: Usage | None) -> Iterator[Event]:
        top = self._generation.request.params.logprobs or 0
        self._untold += chat_logprobs(delta.logprobs[delta.reasons :], top, self._context.tokenizer)
        for kind, piece in (("reasoning", delta.reasoning), ("message", delta.text)):
            if piece:
                yield from self._say(kind, piece)
        for call in delta.tool_calls:
            yield from self._end_item()
            yield from self._call(call)
        if usage is not None:
            cut = delta.finish_reason == "length"
            yield from self._end_item("incomplete" if cut else "completed")
            status = "incomplete" if cut else "completed"
            yield self._event(status, response=self._response(status, usage=usage))

    def _say(self, kind: str, piece: str) -> Iterator[Event]:
        if self._kind != kind:
            yield from self._end_item()
            self._kind, self._text, self._logprobs = kind, "", []
            yield self._event("output_item.added", output_index=len(self._items), item=self._item("in_progress"))
            yield self._event("content_part.added", **self._part_place, part=self._part())
        self._text += piece
        extra = {"logprobs": self._take_logprobs()} if kind == "message" else {}
        yield self._event(f"{_KINDS[kind][1]}.delta", **self._part_place, delta=piece, **extra)

    def _end_item(self, status: str = "completed") -> Iterator[Event]:
        if not self._kind:
            return
        extra = {"logprobs": self._logprobs} if self._kind == "message" else {}
        yield self._event(f"{_KINDS[self._kind][1]}.done", **self._part_place, text=self._text, **extra)
        yield self._event("content_part.done", **self._part_place, part=self._part())
        yield from self._done(self._item(status))
        self._kind = ""

    def _call(self, call: ToolCall) -> Iterator[Event]:
        tool = self._calls.get(call.name, {"type": "function_call", "name": call.name})
        kind = tool["type"]
        free = kind == "custom_tool_call"
        field, told = ("input", _free_text(call.arguments)) if free else ("arguments", call.arguments)
        item = {"id": f"{'ctc' if free else 'fc'}_{self._context.id}{len(self._items):x}", **tool}
        item |= {"status": "in_progress", "call_id": call.id, field: ""}
        place = {"output_index": len(self._items), "item_id": item["id"]}
        name = f"{kind}_{field}"
        yield self._event("output_item.added", output_index=len(self._items), item=item)
        yield self._event(f"{name}.delta", **place, delta=told)
        yield self._event(f"{name}.done", **place, **{field: told})
        yield from self._done({**item, "status": "completed", field: told})

    def _done(self, item: dict[str, Any]) -> Iterator[Event]:
        yield self._event("output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)

    @property
    def _part_place(self) -> dict[str, Any]:
        return {"output_index": len(self._items), "item_id": self._item_id, "content_index": 0}

    @property
    def _item_id(self) -> str:
        return f"{_KINDS[self._kind][0]}_{self._context.id}{len(self._items):x}"

    def _item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        item: dict[str, Any] = {"id": self._item_id, "type": self._kind, "status": status, "content": content}
        if self._kind == "message":
            return item | {"role": "assistant"}
        item["summary"] = []
        if self._seal and content:
            item["encrypted_content"] = SEALED + base64.b64encode(self._text.encode()).decode()
        return item

    def _part(self) -> dict[str, Any]:
        part = {"type": _KINDS[self._kind][1], "text": self._text}
        return part if self._kind == "reasoning" else part | {"annotations": [], "logprobs": self._logprobs}

    def _take_logprobs(self) -> list[dict[str, Any]]:
        taken, self._untold = self._untold, []
        self._logprobs = self._logprobs + taken
        return taken

    def _response(self, status: str, *, usage: Usage | None = None, error: APIError | None = None) -> dict[str, Any]:
        return self._head | {
            "status": status,
            "output": list(self._items),
            "error": None if error is None else {"code": error.code, "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": None if usage is None else _usage(usage),
        }

    def _event(self, name: str, **data: Any) -> Event:
        name = f"response.{name}"
        self._sent += 1
        return Event({"type": name, "sequence_number": self._sent - 1} | data, name)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.hit, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.output,
    } | usage.extra()


def _free_text(arguments: str) -> str:
    """The input of a custom tool; a model that missed the one argument is shown as it wrote."""
    given = json.loads(arguments)
    text = given.get("input")
    return text if isinstance(text, str) and len(given) == 1 else arguments
