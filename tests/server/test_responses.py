"""POST /responses as the openai client sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from hadal.text.tokens import DSML
from tests.fakes import scripted_llm
from tests.server.conftest import Running, running
from tests.test_llm import CALL

PATCH = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="apply_patch">\n<{DSML}parameter name="input" string="true">'
    f"*** Begin\n+ö\n</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
)
# No key occurs in what comes after it in a conversation but its own.
ANSWERS: dict[str, str | None] = {
    "greet": "because they met</think>Grüße, 世界 👋!",
    "plain": "one. two. three.",
    "lookup": "I must look</think>Let me see." + CALL,
    "mend": "so</think>" + PATCH,
    "bare": CALL,
    "inside": "</think>" + CALL.replace('"weather"', '"lab__weather"'),
    "odd": "</think>a" + CALL + "b",
    "21 degrees": "warm</think>It is warm.",
    "as JSON": 'so</think>{"n": 7}',
    "broken": None,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
PATCHER: Any = {
    "type": "custom",
    "name": "apply_patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted_llm(ANSWERS, max_concurrent=4)) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as it:
        yield it


def events_of(client: OpenAI, **body: Any) -> list[Any]:
    return list(client.responses.create(model="scripted", stream=True, **body))


def plain(response: Any) -> Any:
    """A response without what differs from one to the next."""
    data = response.to_dict()
    for item in data["output"]:
        item.pop("id")
        item.pop("call_id", None)
    data["usage"].pop("input_tokens_details")
    return {name: value for name, value in data.items() if name not in ("id", "created_at")}


def test_an_answer_is_reasoning_then_message_then_calls(client: OpenAI) -> None:
    response = client.responses.create(model="scripted", input="lookup", tools=[WEATHER], instructions="Be brief.")
    reasoning, message, call = response.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.encrypted_content) == (
        "reasoning",
        "I must look",
        None,
    )
    assert (message.type, response.output_text) == ("message", "Let me see.")
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call", "weather", {"city": "Zürich", "days": [1, 2]},
    )  # fmt: skip
    assert (response.status, response.store, response.instructions) == ("completed", False, "Be brief.")
    usage = response.usage
    assert usage is not None and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_the_events_tell_each_item_from_its_beginning_to_its_end(client: OpenAI) -> None:
    events = events_of(client, input="lookup", tools=[WEATHER])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = [kind.removeprefix("response.") for kind, _ in groupby(event.type for event in events)]
    assert told == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [e.output_index for e in events if e.type == "response.output_item.done"] == [0, 1, 2]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert events[-1].response.output == done
    for item in done[:2]:
        assert {e.item_id for e in events if getattr(e, "item_id", "").startswith(item.id[:4])} == {item.id}


@pytest.mark.parametrize("text", ["greet", "lookup", "mend", "bare", "odd"])
def test_the_stream_adds_up_to_the_whole_answer(client: OpenAI, text: str) -> None:
    body: Any = {"input": text, "tools": [WEATHER, PATCHER], "include": ["reasoning.encrypted_content"]}
    events = events_of(client, **body)
    whole = client.responses.create(model="scripted", **body)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    if text != "odd":  # there, a call stands between two messages
        assert plain(events[-1].response) == plain(whole)


def test_the_stream_helper_reads_a_response(client: OpenAI) -> None:
    with client.responses.stream(model="scripted", input="lookup", tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.delta", "response.completed"} <= kinds
    call = final.output[-1]
    assert final.output_text == "Let me see." and call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    said: Any = [{"role": "user", "content": "lookup"}, *final.output, result]
    assert client.responses.create(model="scripted", input=said, tools=[WEATHER]).output_text == "It is warm."


def test_a_turn_goes_back_with_its_reasoning_and_finds_its_tokens(client: OpenAI, server: Running) -> None:
    first = client.responses.create(model="scripted", input="lookup", tools=[WEATHER])
    call = first.output[-1]
    assert call.type == "function_call" and first.usage is not None
    said: Any = [{"role": "user", "content": "lookup"}, *first.output]
    said += [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
    second = client.responses.create(model="scripted", input=said, tools=[WEATHER])
    assert second.output_text == "It is warm." and second.usage is not None
    written = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens >= written - 2


def test_sealed_reasoning_stands_for_the_reasoning(client: OpenAI) -> None:
    body: Any = {"model": "scripted", "tools": [WEATHER]}
    first = client.responses.create(input="lookup", include=["reasoning.encrypted_content"], **body)
    reasoning, _, call = first.output
    assert reasoning.type == "reasoning" and call.type == "function_call"
    rest: Any = [call, {"type": "function_call_output", "call_id": "x", "output": "21 degrees"}]
    call.call_id = "x"  # so that nobody remembers
    asked: Any = {"role": "user", "content": "lookup, please"}
    sealed: Any = {"type": "reasoning", "summary": [], "encrypted_content": reasoning.encrypted_content}
    open_: Any = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I must look"}]}
    foreign: Any = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
    lengths = [
        client.responses.create(input=[asked, item, *rest], **body).usage.input_tokens
        for item in (sealed, open_, foreign)
    ]
    assert lengths[0] == lengths[1] > lengths[2]


def test_the_answer_keeps_to_a_schema(client: OpenAI) -> None:
    class Count(BaseModel):
        n: int

    assert client.responses.parse(model="scripted", input="as JSON", text_format=Count).output_parsed == Count(n=7)
    with client.responses.stream(model="scripted", input="as JSON", text_format=Count) as stream:
        assert stream.get_final_response().output_parsed == Count(n=7)


def test_a_custom_tool_is_called_with_free_text(client: OpenAI) -> None:
    events = events_of(client, input="mend", tools=[PATCHER])
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[-5:] == [
        "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    call = events[-1].response.output[-1]
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply_patch", "*** Begin\n+ö\n")
    result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "21 degrees"}
    said: Any = [{"role": "user", "content": "mend"}, *events[-1].response.output, result]
    assert client.responses.create(model="scripted", input=said, tools=[PATCHER]).output_text == "It is warm."


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_in_a_namespace_is_called_by_both_names(client: OpenAI, stream: bool) -> None:
    body: Any = {"tools": [{"type": "namespace", "name": "lab", "description": "of ours", "tools": [WEATHER]}]}
    if stream:
        response = events_of(client, input="inside", **body)[-1].response
    else:
        response = client.responses.create(model="scripted", input="inside", **body)
    call = response.output[-1]
    assert (call.type, call.name, call.namespace) == ("function_call", "weather", "lab")
    assert response.tools[0].to_dict() == body["tools"][0]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    said: Any = [{"role": "user", "content": "inside"}, *response.output, result]
    again = client.responses.create(model="scripted", input=said, **body)
    assert again.output_text == "It is warm."
    written = response.usage.total_tokens
    assert again.usage is not None and again.usage.input_tokens_details.cached_tokens >= written - 2


def test_a_conversation_as_codex_has_it(client: OpenAI) -> None:
    def text(role: str, words: str) -> Any:
        return {"type": "message", "role": role, "content": [{"type": "input_text", "text": words}]}

    said = [text("developer", "permissions"), text("user", "<environment_context/>"), text("user", "mend")]
    body: Any = {
        "model": "scripted", "instructions": "You write code.", "tools": [WEATHER, PATCHER], "tool_choice": "auto",
        "parallel_tool_calls": True, "reasoning": {"effort": "medium", "summary": "auto"}, "store": False,
        "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "text": {"verbosity": "medium"}, "extra_body": {"client_metadata": {"a": "b"}},
    }  # fmt: skip
    written = 0
    for words in ("21 degrees", "mend", ""):
        events: list[Any] = list(client.responses.create(input=said, **body))
        assert events[-1].type == "response.completed"
        for item in (event.item.to_dict() for event in events if event.type == "response.output_item.done"):
            if item["type"] == "reasoning":  # it keeps nothing in the clear
                item |= {"content": None}
            said.append({key: value for key, value in item.items() if key not in ("id", "status")})
        if said[-1]["type"] == "custom_tool_call":
            said.append({"type": "custom_tool_call_output", "call_id": said[-1]["call_id"], "output": words})
        else:
            said.append(text("user", words))
        usage = events[-1].response.usage
        assert usage.input_tokens_details.cached_tokens >= written
        written = usage.total_tokens - 2
    assert [item["type"] for item in said[3:]] == [
        "reasoning", "custom_tool_call", "custom_tool_call_output", "reasoning", "message", "message",
        "reasoning", "custom_tool_call", "custom_tool_call_output",
    ]  # fmt: skip


def test_a_limit_leaves_the_response_incomplete(client: OpenAI) -> None:
    events = events_of(client, input="plain", reasoning={"effort": "none"}, max_output_tokens=3)
    final = events[-1]
    assert final.type == "response.incomplete" and final.response.incomplete_details.reason == "max_output_tokens"
    assert final.response.output[0].status == "incomplete" and final.response.usage.output_tokens == 3


def test_reasoning_none_does_not_think(client: OpenAI) -> None:
    response = client.responses.create(model="scripted", input="plain", reasoning={"effort": "none"})
    assert [item.type for item in response.output] == ["message"] and response.output_text == "one. two. three."
    assert response.reasoning is not None and response.reasoning.effort == "none"


def test_logprobs_are_those_of_the_text(client: OpenAI) -> None:
    body: Any = {"input": "greet", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(model="scripted", **body).output[-1].content[0]
    told = next(e for e in events_of(client, **body) if e.type == "response.output_text.done")
    spelled = b"".join(bytes(entry.bytes) for entry in whole.logprobs)
    assert whole.text.encode() in spelled
    assert [e.token for e in told.logprobs] == [e.token for e in whole.logprobs]
    assert {len(e.top_logprobs) for e in whole.logprobs} == {2}


def test_a_failing_engine_ends_the_stream_as_failed(client: OpenAI) -> None:
    final = events_of(client, input="broken")[-1]
    assert final.type == "response.failed" and final.response.status == "failed" and final.response.error.message
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="scripted", input="broken")


def test_a_client_that_leaves_ends_the_answer(client: OpenAI, server: Running) -> None:
    stream = client.responses.create(model="scripted", input="endless", stream=True)
    next(iter(stream))
    assert server.active() == 1
    stream.close()
    end = time.monotonic() + 10
    while server.active() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.active() == 0


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (
            {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}},
            openai.UnprocessableEntityError,
            "has no web",
        ),
        (
            {"tools": [{"type": "web_search"}], "tool_choice": "required"},
            openai.UnprocessableEntityError,
            "there are no `tools`",
        ),
        ({"tools": [{"type": "shell"}]}, openai.UnprocessableEntityError, "type 'shell'"),
        ({"previous_response_id": "resp_1"}, openai.UnprocessableEntityError, "nothing is stored"),
        ({"background": True}, openai.UnprocessableEntityError, "stream the response"),
        ({"reasoning": {"effort": "most"}}, openai.UnprocessableEntityError, "reasoning.effort"),
        ({"tool_choice": {"type": "function", "name": "f"}}, openai.UnprocessableEntityError, "'f'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, openai.UnprocessableEntityError, "item_reference"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            openai.UnprocessableEntityError,
            "text only",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, openai.UnprocessableEntityError, "needs `call_id`"),
        ({"model": "gpt-9"}, openai.BadRequestError, "'gpt-9'"),
        ({"input": []}, openai.BadRequestError, "empty"),
        ({"extra_body": {"colour": 1}}, openai.UnprocessableEntityError, "colour"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(
    client: OpenAI, body: dict[str, Any], error: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(error) as caught:
        client.responses.create(**{"model": "scripted", "input": "plain", **body})
    assert words in str(caught.value)


def test_what_has_no_effect_is_named(client: OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model="scripted", input="plain", store=True, metadata={"a": "b"}, parallel_tool_calls=False,
        text={"verbosity": "low"}, reasoning={"effort": "xhigh", "summary": "auto"}, prompt_cache_key="k",
    )  # fmt: skip
    assert set(raw.headers["x-hadal-ignored"].split(", ")) == {
        "store", "metadata", "text.verbosity", "reasoning.summary", "prompt_cache_key",
    }  # fmt: skip
    made = raw.parse()
    assert raw.headers["x-hadal-thinking"] == "high" and made.metadata == {"a": "b"} and not made.parallel_tool_calls


def test_tools_that_only_openai_can_run_are_taken_and_not_shown_to_the_model(client: OpenAI) -> None:
    built_in: Any = [
        {"type": "web_search", "external_web_access": False},
        {"type": "mcp", "server_label": "x", "server_url": "https://x", "require_approval": "never"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
    ]
    own: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    used = []
    for tools in ([*built_in, own], [own]):
        raw = client.responses.with_raw_response.create(model="scripted", input="plain", tools=tools)
        made = raw.parse()
        assert made.usage is not None and [tool.type for tool in made.tools] == ["function"]
        used.append((made.usage.input_tokens, raw.headers.get("x-hadal-ignored")))
    assert used == [(used[1][0], "tools.web_search, tools.code_interpreter, tools.mcp"), (used[1][0], None)]
