"""Events and whole messages of any answer, however it is cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings

from hadal.server.anthropic_wire import AnthropicWire
from tests.server.test_responses_wire import CALLS, PIECES, REASONS, USAGE, context, cut, feed, output


def assemble(events: list[Any]) -> dict[str, Any]:
    """The message that a client puts together."""
    first, *blocks, delta, last = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = {**first["message"], "content": []}
    for event in blocks:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            (_, kind), (name, piece) = event["delta"].items()
            block = message["content"][event["index"]]
            block["json" if kind == "input_json_delta" else name] += piece
        else:
            block = message["content"][event["index"]]
            given = block.pop("json")
            if block["type"] == "tool_use":
                block["input"] = json.loads(given)
    return message | delta["delta"] | {"usage": delta["usage"]}


@settings(deadline=None)
@given(PIECES, PIECES, CALLS, REASONS)
def test_what_the_events_tell_is_the_whole_message(reasoning: Any, text: Any, calls: Any, reason: Any) -> None:
    whole = AnthropicWire(context()).whole([output(reasoning, text, calls, reason)], USAGE)
    assert assemble(feed(AnthropicWire(context()), cut(reasoning, text, calls, reason))) == whole
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == USAGE.prompt
    assert whole["stop_reason"] == {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason]
