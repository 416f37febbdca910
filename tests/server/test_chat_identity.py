"""DeepSeek's chat API as its documents tell it, fact by fact, seen by OpenAI's own client."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

from hadal.accounts import Accounts, Limits
from hadal.engine import Logprob
from hadal.server.ask import Ask
from hadal.server.chat import ChatBody
from hadal.server.errors import APIError
from hadal.server.logprobs import chat_logprobs
from hadal.server.settings import Settings
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.chatting import TOOL, Chat, chat, client_of, create, stream, told
from tests.server.conftest import Running, running
from tests.test_llm import SCRIPT


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as it:
        yield it


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta", "/beta/v1"])
def test_base_urls(server: Running, prefix: str) -> None:
    with client_of(server, prefix) as client:
        assert create(client, chat())["choices"][0]["message"]["content"] == "Grüße, 世界 👋!"


ROLES = [
    ("system", {"content": "be short"}),
    ("developer", {"content": "be short"}),
    ("user", {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
    ("user", {"content": "a", "name": "Ada"}),
    ("assistant", {"content": "a", "reasoning_content": "b"}),
    ("assistant", {"content": "a", "reasoning": "b", "refusal": "", "annotations": []}),
    ("assistant", {"content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]}),
    ("tool", {"content": "sunny", "tool_call_id": "1"}),
]  # fmt: skip


@pytest.mark.parametrize(("role", "rest"), ROLES)
def test_roles(client: openai.OpenAI, role: str, rest: Chat) -> None:
    messages = [{"role": role, **rest}, {"role": "user", "content": "greet"}]
    assert create(client, chat(messages=messages))["choices"][0]["message"]["content"] == "Grüße, 世界 👋!"


# Parameter, values within its range, values beyond it; the latter are answered by 422 and name the parameter.
RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("max_tokens", [1, 393216], [0, 393217, -1, "5", 1.5, True]),
    ("max_completion_tokens", [1, 393216], [0, 393217]),
    ("temperature", [0, 0.5, 2], [-0.1, 2.1, "1", True]),
    ("top_p", [0.01, 1], [0, 1.1]),
    ("top_k", [-1, 0, 5], [-2, 1.5]),
    ("n", [1, 3], [0, 129, True]),
    ("seed", [0, -1, 2**64 - 1], [2**64, "1"]),
    ("stop", ["x", ["x"] * 16, []], [["x"] * 17, [""], 5]),
    ("stop_token_ids", [[3]], [[-1], ["a"]]),
    ("stream", [False], ["yes", 1]),
    ("logprobs", [True, False], ["yes", 5]),
    ("top_logprobs", [], [-1, 21]),
    ("prompt_logprobs", [0, 2], [-1, 21]),
    ("response_format", [{"type": "text"}], [{"type": "xml"}, {"type": "json_schema"}, "json"]),
    ("tools", [[TOOL], []], [[TOOL] * 129, [{"type": "web"}], [{"type": "function"}], {}]),
    ("tool_choice", ["none", "auto"], ["maybe", "required", {"type": "function", "function": {"name": "f"}}]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("user_id", ["a-B_9", "x" * 512], ["a b", "x" * 513, "", 5]),
    ("priority", [-8, 8], [-9, 9]),
    ("repetition_penalty", [1], [1.1]),
    ("logit_bias", [{}], [{"5": 1}]),
    ("messages", [], [[], "hello", [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, good, _ in RANGES for value in good])
def test_values_within_their_range(client: openai.OpenAI, name: str, value: Any) -> None:
    body = chat(max_tokens=5, tools=[TOOL]) | {name: value}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    assert create(client, body)["object"] == "chat.completion"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, bad in RANGES for value in bad])
def test_values_beyond_their_range(client: openai.OpenAI, name: str, value: Any) -> None:
    body = chat(logprobs=True) | {name: value}
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(client, body)
    assert re.match(rf"{name}\b", str(caught.value.param)) and f"`{name}" in caught.value.message
    assert caught.value.type == "invalid_request_error"


def long_name(size: int) -> Chat:
    return {"tools": [{"type": "function", "function": {"name": "f" * size}}]}


# What is refused, with which status, naming what.
REFUSED: list[tuple[Chat, int, str | None, str]] = [
    ({"modle": 1}, 422, "modle", "unknown field `modle`"),
    ({"messages": [{"role": "user", "content": "x", "mood": "low"}]}, 422, "messages[0].mood", "unknown field"),
    ({"model": "other"}, 400, "model", "does not exist"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "`stream`"),
    ({"top_logprobs": 3}, 422, None, "`logprobs`"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 422, None, "differ"),
    ({"messages": [{"role": "user"}]}, 400, None, "no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "text part"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 422, "messages[0]", "`tool_call_id`"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "nothing to answer"),
    ({"messages": [{"role": "assistant", "content": "x", "prefix": 1}]}, 422, "messages[0].prefix", "boolean"),
    ({"messages": [{"role": "assistant", "content": "x", "prefix": True}] * 2}, 400, None, "last text"),
    ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, 400, None, "'prefix'"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "prompt", "the context holds 4096"),
    (long_name(65), 422, "tools[0].function.name", "pattern"),
    ({"functions": [{"name": "f"}]}, 422, None, "send that"),
    ({"function_call": "auto"}, 422, None, "`tool_choice`"),
    ({"regex": "a", "guided_choice": ["a"]}, 422, "guided_choice", "send one of them"),
    ({"guided_json": "{"}, 422, "guided_json", "is not JSON"),
    ({"guided_choice": []}, 422, "guided_choice", "non-empty"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, 422, "structured_outputs.regex", "send one of them"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, 422, "response_format", "send one of them"),
    ({"prompt_logprobs": 1, "stream": True}, 422, None, "`stream`"),
]


@pytest.mark.parametrize(("change", "status", "param", "words"), REFUSED)
def test_refusals(server: Running, change: Chat, status: int, param: str | None, words: str) -> None:
    got, body = server.call("/chat/completions", chat() | change)
    assert got == status and set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param and words in body["error"]["message"]


def test_a_body_that_is_no_json_is_400_and_unknown_paths_404(server: Running) -> None:
    status, body = server.call("/v1/chat/completions", '{"model": ')
    assert status == 400 and "not valid JSON" in body["error"]["message"]
    status, body = server.call("/v1/chat/completions", "[1]")
    assert status == 422 and body["error"]["param"] is None
    status, body = server.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert status == 422 and body["error"]["message"] == "field `model` is missing"
    status, body = server.call("/v1/unheard-of")
    assert status == 404 and "/v1/unheard-of" in body["error"]["message"]


def test_a_wrong_key_is_401_and_a_spent_balance_402(tmp_path: Path) -> None:
    with Accounts(folder=tmp_path) as accounts:
        _, poor = accounts.keys.create("poor", Limits(budget=Decimal(0)))
        with running(scripted_llm(SCRIPT), accounts=accounts) as server:
            with client_of(server, key="sk-wrong") as client, pytest.raises(openai.AuthenticationError):
                create(client, chat())
            with client_of(server, key=poor) as client, pytest.raises(openai.APIStatusError) as caught:
                create(client, chat())
            assert caught.value.status_code == 402


WHOLE: dict[str, Callable[[Chat], bool]] = {
    "object": lambda made: made["object"] == "chat.completion",
    "id": lambda made: made["id"].startswith("chatcmpl-"),
    "model": lambda made: made["model"] == "scripted",
    "fingerprint": lambda made: made["system_fingerprint"].startswith("fp_"),
    "created": lambda made: made["created"] > 1_700_000_000,
    "content": lambda made: made["choices"][0]["message"]["content"] == "Grüße, 世界 👋!",
    "reasoning": lambda made: made["choices"][0]["message"]["reasoning_content"] == "because they met",
    "role": lambda made: made["choices"][0]["message"]["role"] == "assistant",
    "no calls": lambda made: "tool_calls" not in made["choices"][0]["message"],
    "finish reason": lambda made: made["choices"][0]["finish_reason"] == "stop",
    "no logprobs": lambda made: made["choices"][0]["logprobs"] is None,
    "total": lambda made: (
        made["usage"]["total_tokens"] == made["usage"]["prompt_tokens"] + made["usage"]["completion_tokens"]
    ),
    "hit and miss": lambda made: (
        made["usage"]["prompt_tokens"]
        == made["usage"]["prompt_cache_hit_tokens"] + made["usage"]["prompt_cache_miss_tokens"]
    ),
    "cached tokens": lambda made: (
        made["usage"]["prompt_tokens_details"]["cached_tokens"] == made["usage"]["prompt_cache_hit_tokens"]
    ),
    "reasoning tokens": lambda made: (
        0 < made["usage"]["completion_tokens_details"]["reasoning_tokens"] < made["usage"]["completion_tokens"]
    ),
    "thinking": lambda made: made["thinking"] == {"type": "enabled", "effort": "high"},
}


@pytest.fixture(scope="module")
def whole(client: openai.OpenAI) -> Chat:
    return create(client, chat())


@pytest.mark.parametrize("fact", WHOLE)
def test_a_whole_answer(whole: Chat, fact: str) -> None:
    assert WHOLE[fact](whole), whole


STREAMED: dict[str, Callable[[list[Chat]], bool]] = {
    "object": lambda chunks: {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"},
    "one id": lambda chunks: len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1,
    "first delta": lambda chunks: chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""},
    "thinking": lambda chunks: chunks[0]["thinking"] == {"type": "enabled", "effort": "high"},
    "content": lambda chunks: told(chunks, "content") == "Grüße, 世界 👋!",
    "reasoning": lambda chunks: told(chunks, "reasoning_content") == "because they met",
    "one at a time": lambda chunks: (
        not any(
            c["choices"][0]["delta"].get("content") and c["choices"][0]["delta"].get("reasoning_content")
            for c in chunks
        )
    ),
    "null beside": lambda chunks: all(
        c["choices"][0]["delta"]["content"] is None for c in chunks if c["choices"][0]["delta"].get("reasoning_content")
    ),
    "every chunk has a choice": lambda chunks: all(len(chunk["choices"]) == 1 for chunk in chunks),
    "finish reason once": lambda chunks: (
        [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    ),
    "usage at the end": lambda chunks: [i for i, c in enumerate(chunks) if c["usage"]] == [len(chunks) - 1],
    "same usage": lambda chunks: chunks[-1]["usage"]["completion_tokens"] > 10,
}


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_streamed_answer(client: openai.OpenAI, options: Chat) -> None:
    chunks = stream(client, chat() | options)
    assert [fact for fact, holds in STREAMED.items() if not holds(chunks)] == []


def test_a_stream_ends_with_the_sentinel(server: Running) -> None:
    with client_of(server) as client:
        raw = client.chat.completions.with_raw_response.create(**chat(), stream=True)
        lines = [line for line in raw.http_response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        assert raw.headers["content-type"].startswith("text/event-stream")


FINISH: list[tuple[Chat, str]] = [
    (chat("greet"), "stop"),
    (chat("greet", stop="世"), "stop"),
    (chat("nothing known", max_tokens=3), "length"),
    (chat("call", tools=[TOOL]), "tool_calls"),
]


@pytest.mark.parametrize(("body", "reason"), FINISH)
def test_finish_reasons(client: openai.OpenAI, body: Chat, reason: str) -> None:
    assert create(client, body)["choices"][0]["finish_reason"] == reason
    assert stream(client, body)[-1]["choices"][0]["finish_reason"] == reason


def test_tool_calls_whole_and_as_deltas(client: openai.OpenAI) -> None:
    body = chat("call", tools=[TOOL])
    message = create(client, body)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert set(call) == {"id", "type", "function"} and call["type"] == "function"
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich", "days": [1, 2]}
    deltas = [call for chunk in stream(client, body) for call in chunk["choices"][0]["delta"].get("tool_calls") or []]
    assert [(d["index"], d["type"], d["function"]) for d in deltas] == [(0, "function", call["function"])]


def test_without_thinking_there_is_no_reasoning_content(client: openai.OpenAI) -> None:
    body = chat("plain", thinking={"type": "disabled"})
    made = create(client, body)
    assert "reasoning_content" not in made["choices"][0]["message"]
    assert made["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert made["thinking"] == {"type": "disabled", "effort": None}
    assert not any("reasoning_content" in chunk["choices"][0]["delta"] for chunk in stream(client, body))


def test_logprobs_of_content_and_reasoning(client: openai.OpenAI) -> None:
    body = chat(logprobs=True, top_logprobs=2)
    whole = create(client, body)["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] or {} for chunk in stream(client, body)]
    for field in ("content", "reasoning_content"):
        assert whole[field] == [token for part in parts for token in part.get(field) or []]
        assert len(whole[field]) > 5
        first = whole[field][0]
        assert set(first) == {"token", "logprob", "bytes", "top_logprobs"} and len(first["top_logprobs"]) == 2
        assert bytes(first["bytes"]).decode() == first["token"] and -1e-5 < first["logprob"] <= 0
    plain = create(client, chat("plain", thinking=False, logprobs=True))["choices"][0]["logprobs"]
    assert plain["reasoning_content"] is None and plain["content"][0]["top_logprobs"] == []


def test_improbable_tokens_have_a_number_that_json_can_hold() -> None:
    (token,) = chat_logprobs([{5: Logprob(-math.inf, 7), 6: Logprob(-0.5, 1)}], 1, small_tokenizer())
    assert token["logprob"] == -9999.0 and token["top_logprobs"][0]["logprob"] == -0.5


def test_the_prefix_is_continued_and_not_repeated(client: openai.OpenAI) -> None:
    start = {"role": "assistant", "content": "one. ", "prefix": True}
    for thinking in (True, False):
        body = chat(messages=[{"role": "user", "content": "plain"}, start], thinking=thinking)
        assert create(client, body)["choices"][0]["message"]["content"] == "two. three."
    reasoning = {"role": "assistant", "content": "", "reasoning_content": "because", "prefix": True}
    body = chat(messages=[{"role": "user", "content": "greet"}, reasoning])
    assert create(client, body)["choices"][0]["message"]["reasoning_content"] == " they met"


def test_users_do_not_share_prefixes(client: openai.OpenAI) -> None:
    body = chat("greet " + "the cat " * 40)
    hits = [create(client, body | {"user_id": user})["usage"]["prompt_cache_hit_tokens"] for user in ("a", "b", "a")]
    assert hits[:2] == [0, 0] and hits[2] > 0


def ask_of(change: Chat) -> Ask:
    return ChatBody.model_validate(chat() | change).ask(Settings(model="scripted"))


DEFAULTS = [({"thinking": False}, 8192), ({}, 65536), ({"reasoning_effort": "max"}, 131072)]


@pytest.mark.parametrize(("change", "most"), DEFAULTS)
def test_default_limits(change: Chat, most: int) -> None:
    assert ask_of(change).sampling["max_tokens"] == most


def test_a_limit_is_cut_to_the_context() -> None:
    with running(scripted_llm(SCRIPT, context=128)) as server, client_of(server) as client:
        assert create(client, chat("nothing known", max_tokens=393216))["usage"]["total_tokens"] == 128


def test_there_may_be_128_tools_and_sizes_are_limited() -> None:
    assert len(ask_of({"tools": [TOOL] * 128}).tools) == 128
    large = {"type": "object", "description": "x" * (256 << 10)}
    for change in (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": large}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": large}}},
    ):
        with pytest.raises(APIError, match="at most 262144 are accepted") as caught:
            ask_of(change)
        assert caught.value.status == 422


def test_calls_may_be_parallel_unless_they_shall_not() -> None:
    assert ask_of({}).parallel_tool_calls and ask_of({"parallel_tool_calls": None}).parallel_tool_calls
    assert not ask_of({"parallel_tool_calls": False}).parallel_tool_calls


def test_smaller_priorities_run_sooner() -> None:
    assert ask_of({"priority": -8}).priority > ask_of({}).priority > ask_of({"priority": 8}).priority


def test_strict_servers_want_every_reasoning_back_when_there_are_tools(client: openai.OpenAI) -> None:
    turn = {"role": "assistant", "content": "a"}
    messages = [*chat("x")["messages"], turn, *chat()["messages"]]
    with running(scripted_llm(SCRIPT), history="strict") as server, client_of(server) as strict:
        with pytest.raises(openai.BadRequestError, match="reasoning_content"):
            create(strict, chat(messages=messages, tools=[TOOL]))
        whole = [messages[0], turn | {"reasoning_content": "b"}, messages[2]]
        for body in (chat(messages=whole, tools=[TOOL]), chat(messages=messages)):
            assert create(strict, body)["choices"][0]["finish_reason"] == "stop"
    assert create(client, chat(messages=messages, tools=[TOOL]))["choices"][0]["finish_reason"] == "stop"


IGNORED = {"frequency_penalty": 1.5, "store": True, "metadata": {"a": "b"}, "user": "Ada"}


def test_parameters_without_effect_are_told(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**chat(), extra_body=IGNORED)
    assert set(raw.headers["x-hadal-ignored"].split(", ")) == set(IGNORED)
    assert raw.parse().choices[0].message.content == "Grüße, 世界 👋!"


def test_strict_servers_do_not_heed_the_temperature_of_a_thinking_model() -> None:
    with running(scripted_llm(SCRIPT), history="strict") as server, client_of(server) as client:
        raw = client.chat.completions.with_raw_response.create(**chat(top_p=0.5))
        assert set(raw.headers["x-hadal-ignored"].split(", ")) == {"temperature", "top_p"}
        raw = client.chat.completions.with_raw_response.create(**chat("plain"), extra_body={"thinking": False})
        assert "x-hadal-ignored" not in raw.headers
