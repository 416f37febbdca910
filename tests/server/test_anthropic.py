"""POST /v1/messages as the anthropic client sees it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from tests.fakes import scripted_llm
from tests.server.conftest import Running, running
from tests.test_llm import CALL

# No key occurs in what comes after it in a conversation but its own.
ANSWERS: dict[str, str | None] = {
    "greet": "because they met</think>Grüße, 世界 👋!",
    "plain": "one. two. three.",
    "lookup": "I must look</think>Let me see." + CALL,
    "bare": CALL,
    "odd": "</think>a" + CALL + "b",
    "21 degrees": "warm</think>It is warm.",
    "as JSON": 'so</think>{"n": 7}',
    "broken": None,
}
WEATHER: Any = {"name": "weather", "description": "tells it", "input_schema": {"type": "object"}}
OFF: Any = {"type": "disabled"}
BODY: dict[str, Any] = {"model": "claude-sonnet-5[1m]", "max_tokens": 300}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted_llm(ANSWERS, max_concurrent=4)) as it:
        yield it


@pytest.fixture(scope="module", params=["", "/anthropic"])
def client(server: Running, request: pytest.FixtureRequest) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url + request.param, api_key="any", max_retries=0) as it:
        yield it


def said(text: Any) -> Any:
    return {"role": "user", "content": text}


def plain(message: anthropic.types.Message) -> Any:
    """A message without what differs from one to the next."""
    data = message.to_dict()
    data["content"] = [
        {k: v for k, v in block.items() if k not in ("id", "parsed_output")} for block in data["content"]
    ]
    return {k: data[k] for k in ("content", "stop_reason", "stop_sequence", "role", "model")}


def test_an_answer_is_thinking_then_text_then_calls(client: Anthropic) -> None:
    message = client.messages.create(messages=[said("lookup")], tools=[WEATHER], **BODY)
    thinking, text, call = message.content
    assert thinking.type == "thinking" and thinking.thinking == "I must look" and thinking.signature
    assert text.type == "text" and text.text == "Let me see."
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Zürich", "days": [1, 2]})
    assert (message.stop_reason, message.model, message.role) == ("tool_use", BODY["model"], "assistant")
    assert message.usage.output_tokens_details is not None
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens


def test_the_events_tell_each_block_from_its_beginning_to_its_end(client: Anthropic) -> None:
    events: list[Any] = list(client.messages.create(messages=[said("lookup")], tools=[WEATHER], stream=True, **BODY))
    told = [(e.type, e.delta.type if e.type == "content_block_delta" else getattr(e, "index", None)) for e in events]
    assert [kind for kind, _ in groupby(told)] == [
        ("message_start", None),
        ("content_block_start", 0), ("content_block_delta", "thinking_delta"),
        ("content_block_delta", "signature_delta"), ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", "text_delta"), ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", "input_json_delta"), ("content_block_stop", 2),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    begun, ended = events[0].message, events[-2]
    assert (begun.content, begun.stop_reason, begun.usage.output_tokens) == ([], None, 0)
    total = ended.usage.input_tokens + ended.usage.cache_read_input_tokens
    assert begun.usage.input_tokens == total and ended.delta.stop_reason == "tool_use"


@pytest.mark.parametrize("text", ["greet", "lookup", "bare", "odd"])
def test_the_stream_adds_up_to_the_whole_answer(client: Anthropic, text: str) -> None:
    body: Any = {"messages": [said(text)], "tools": [WEATHER], **BODY}
    with client.messages.stream(**body) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = client.messages.create(**body)
    assert streamed == "".join(block.text for block in whole.content if block.type == "text")
    if text != "odd":  # there, a call stands between two texts
        assert plain(final) == plain(whole)


async def _collect(url: str) -> anthropic.types.Message:
    async with (
        AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as client,
        client.messages.stream(messages=[said("greet")], **BODY) as stream,
    ):
        return await stream.get_final_message()


def test_the_asynchronous_client_reads_the_same(server: Running) -> None:
    assert asyncio.run(_collect(server.url)).content[-1].to_dict()["text"] == "Grüße, 世界 👋!"


def test_a_turn_goes_back_with_its_thinking_and_finds_its_tokens(client: Anthropic) -> None:
    asked: Any = {"tools": [WEATHER], **BODY}
    first = client.messages.create(messages=[said("lookup")], **asked)
    call = first.content[-1]
    assert call.type == "tool_use"
    result: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21 degrees"}]}]
    turn: Any = {"role": "assistant", "content": first.content}
    second = client.messages.create(messages=[said("lookup"), turn, said(result)], **asked)
    assert second.content[-1].to_dict()["text"] == "It is warm." and second.stop_reason == "end_turn"
    before, after = first.usage, second.usage
    written = before.input_tokens + (before.cache_read_input_tokens or 0) + before.output_tokens
    assert (after.cache_read_input_tokens or 0) >= written - 2 > after.input_tokens
    bare: Any = {"role": "assistant", "content": [block for block in first.content if block.type != "thinking"]}
    repaired = client.messages.create(messages=[said("lookup"), bare, said(result)], **asked)
    total = after.input_tokens + (after.cache_read_input_tokens or 0)
    assert repaired.usage.input_tokens + (repaired.usage.cache_read_input_tokens or 0) == total


def test_strict_history_refuses_a_turn_of_this_server_without_its_thinking() -> None:
    with running(scripted_llm(ANSWERS), history="strict") as server:
        body: Any = {"model": "scripted", "max_tokens": 300, "messages": [said("lookup")], "tools": [WEATHER]}
        content = server.call("/v1/messages", body)[1]["content"]

        def follow_up(blocks: Any) -> tuple[int, Any]:
            result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": "21 degrees"}
            turns = [said("lookup"), {"role": "assistant", "content": blocks}, said([result])]
            return server.call("/v1/messages", {**body, "messages": turns})

        assert follow_up(content)[0] == 200
        status, answer = follow_up(content[1:])
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        foreign = {**content[-1], "id": "made up", "input": {"city": "Bern"}}
        assert follow_up([foreign])[0] == 200


def test_the_answer_keeps_to_a_schema(client: Anthropic) -> None:
    class Count(BaseModel):
        n: int

    message = client.messages.parse(messages=[said("as JSON")], output_format=Count, **BODY)
    assert message.parsed_output == Count(n=7)


def test_thinking_can_be_switched_off(client: Anthropic) -> None:
    message = client.messages.create(messages=[said("plain")], thinking=OFF, **BODY)
    assert [block.type for block in message.content] == ["text"] and message.stop_reason == "end_turn"


@pytest.mark.parametrize("stream", [False, True])
def test_why_an_answer_ended_is_told(client: Anthropic, stream: bool) -> None:
    for more, reason, text in (
        ({"stop_sequences": [" tw", "three"]}, ("stop_sequence", " tw"), "one."),
        ({"max_tokens": 3}, ("max_tokens", None), None),
        ({}, ("end_turn", None), "one. two. three."),
    ):
        body: Any = {"messages": [said("plain")], "thinking": OFF, **BODY, **more}
        if stream:
            with client.messages.stream(**body) as told:
                message: Any = told.get_final_message()
        else:
            message = client.messages.create(**body)
        assert (message.stop_reason, message.stop_sequence) == reason
        assert text is None or message.content[0].text == text


def test_the_end_of_the_context_is_told_apart_from_the_limit() -> None:
    with running(scripted_llm({}, context=40)) as server:
        body = {"model": "scripted", "max_tokens": 300, "messages": [said("on and on")]}
        assert server.call("/v1/messages", body)[1]["stop_reason"] == "model_context_window_exceeded"


def test_an_answer_goes_on_from_its_beginning(client: Anthropic) -> None:
    messages: Any = [said("plain"), {"role": "assistant", "content": "one. two"}]
    message = client.messages.create(messages=messages, thinking=OFF, **BODY)
    assert message.content[0].to_dict()["text"] == ". three."


def test_tokens_are_counted_as_they_are_billed(client: Anthropic) -> None:
    body: Any = {"model": BODY["model"], "messages": [said("greet")], "system": "be kind", "tools": [WEATHER]}
    usage = client.messages.create(max_tokens=2, **body).usage
    counted = client.messages.count_tokens(**body).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_the_attribution_of_claude_code_does_not_part_the_prompts(client: Anthropic) -> None:
    def send(turn: int) -> Any:
        system = [f"x-anthropic-billing-header: cc_version=2.1; cch={turn:05x};", "You write code. " * 9]
        blocks: Any = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in system]
        user = f"user_1_account_2_session_{turn:08d}-0000-0000-0000-000000000000"
        return client.messages.with_raw_response.create(
            messages=[said("greet")], system=blocks, metadata={"user_id": user}, **BODY
        )

    first, second = send(1), send(2)
    assert first.headers["x-hadal-ignored"] == "system[0], cache_control"
    usage = second.parse().usage
    assert usage.input_tokens <= 2 < usage.cache_read_input_tokens


def test_a_failing_engine_ends_the_stream_with_an_error(client: Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(client.messages.create(messages=[said("broken")], stream=True, **BODY))
    assert isinstance(caught.value.body, dict) and caught.value.body["error"]["type"] == "api_error"
    with pytest.raises(anthropic.InternalServerError):
        client.messages.create(messages=[said("broken")], **BODY)


def test_a_client_that_leaves_ends_the_answer(client: Anthropic, server: Running) -> None:
    stream = client.messages.create(messages=[said("endless")], stream=True, model="scripted", max_tokens=100000)
    next(iter(stream))
    assert server.active() == 1
    stream.close()
    end = time.monotonic() + 10
    while server.active() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.active() == 0


def test_a_silent_stream_is_kept_open_by_pings() -> None:
    with running(scripted_llm({}), keep_alive_seconds=0.001) as server:
        body = {"model": "scripted", "max_tokens": 40, "messages": [said("greet")], "stream": True}
        request = urllib.request.Request(
            f"{server.url}/v1/messages", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert b'event: ping\ndata: {"type": "ping"}\n\n' in response.read()


REFUSED = anthropic.UnprocessableEntityError


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, REFUSED, "has no web"),
        ({"messages": [said([{"type": "image", "source": {"type": "url", "url": "x"}}])]}, REFUSED, "type 'image'"),
        ({"messages": [said([{"type": "document", "source": {}}])]}, REFUSED, "reads text"),
        (
            {"messages": [said("a"), {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
            REFUSED,
            "type 'redacted_thinking'",
        ),
        ({"messages": [said([{"type": "thinking", "thinking": "x"}])]}, REFUSED, "only assistant messages"),
        ({"messages": [said([{"type": "tool_result"}])]}, REFUSED, "needs `tool_use_id`"),
        ({"messages": []}, REFUSED, "messages"),
        ({"model": "gpt-9"}, anthropic.BadRequestError, "'gpt-9'"),
        ({"tool_choice": {"type": "any"}}, REFUSED, "no `tools`"),
        ({"output_config": {"effort": "most"}}, REFUSED, "output_config.effort"),
        ({"extra_body": {"colour": 1}}, REFUSED, "colour"),
        ({"extra_body": {"temperature": 3}}, REFUSED, "temperature"),
        ({"max_tokens": 0}, REFUSED, "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(
    client: Anthropic, body: dict[str, Any], error: type[anthropic.APIStatusError], words: str
) -> None:
    with pytest.raises(error) as caught:
        client.messages.create(**{**BODY, "messages": [said("plain")], **body})
    told = caught.value.body
    assert isinstance(told, dict) and told["type"] == "error" and words in told["error"]["message"]


def test_a_wrong_key_and_a_wrong_path_answer_in_the_same_shape(server: Running) -> None:
    for path in ("/anthropic/v1/nothing", "/v1/messages/nothing"):
        status, answer = server.call(path, {})
        assert (status, answer["type"], answer["error"]["type"]) == (404, "error", "not_found_error")
