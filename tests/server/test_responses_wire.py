"""Events and whole responses of any answer, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.llm import CompletionOutput, Delta, Generation, ToolCall
from hadal.server.ask import Ask
from hadal.server.responses_wire import ResponsesWire
from hadal.server.wire import Context, Usage
from tests.fakes import scripted_llm

USAGE = Usage(prompt=9, hit=4, output=20, reasoning=3)
PIECES = st.lists(st.text(max_size=3), max_size=4)
CALLS = st.lists(
    st.builds(
        ToolCall, st.uuids().map(str), st.sampled_from(["f", "free"]), st.sampled_from(['{"input": "x\\ny"}', "{}"])
    ),
    max_size=3,
)
REASONS = st.sampled_from(["stop", "length", "tool_calls"])


@cache
def generation() -> Generation:
    llm = scripted_llm({})
    (made,) = llm.prepare_chat([{"role": "user", "content": "hi"}], llm.default_params())
    return made


def context() -> Context:
    return Context("0" * 32, 1, Ask("m", thinking=True), [generation()], scripted_llm({}).tokenizer)


def cut(reasoning: Sequence[str], text: Sequence[str], calls: Sequence[ToolCall], reason: Any) -> list[Delta]:
    """The deltas of an answer, with nothing to tell in some of them."""
    deltas = [Delta(reasoning=piece) for piece in reasoning] + [Delta(piece) for piece in text]
    return [*deltas, Delta(), *(Delta(tool_calls=(call,)) for call in calls), Delta(finish_reason=reason)]


def feed(wire: Any, deltas: Sequence[Delta]) -> list[Any]:
    """All events of an answer, as they are sent."""
    events = [event.data for event in wire.opening()]
    for delta in deltas:
        events += [event.data for event in wire.feed(0, delta, USAGE if delta is deltas[-1] else None)]
    return events


def output(reasoning: Sequence[str], text: Sequence[str], calls: Sequence[ToolCall], reason: Any) -> CompletionOutput:
    """The same answer whole."""
    return CompletionOutput(0, "".join(text), [], "".join(reasoning), list(calls), None, reason)


@settings(deadline=None)
@given(PIECES, PIECES, CALLS, REASONS)
def test_what_the_events_tell_is_the_whole_response(reasoning: Any, text: Any, calls: Any, reason: Any) -> None:
    def wire() -> ResponsesWire:
        return ResponsesWire(
            context(), {"user": "me"}, {"free": {"type": "custom_tool_call", "name": "free"}}, seal=True
        )

    events = feed(wire(), cut(reasoning, text, calls, reason))
    whole = wire().whole([output(reasoning, text, calls, reason)], USAGE)
    assert events[-1]["response"] == whole
    assert events[-1]["type"] == f"response.{whole['status']}" and whole["user"] == "me"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))

    told: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            told[event["output_index"]] = told.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(whole["output"]):
        shown = item["content"][0]["text"] if "content" in item else item.get("input", item.get("arguments"))
        assert told[index] == shown
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == whole["output"]
    assert [e["item"]["id"] for e in events if e["type"] == "response.output_item.added"] == [
        item["id"] for item in whole["output"]
    ]
