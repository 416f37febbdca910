"""Damaged bodies are answered or refused and never fail the server; streams cut anywhere add up to the answer."""

from __future__ import annotations

import asyncio
import copy
import http.client
import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hadal.llm import Delta, Generation
from hadal.server.ask import Ask
from hadal.server.backend import Ticket
from hadal.server.chat_wire import ChatWire
from hadal.server.wire import Context, Usage
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.chatting import TOOL, chat
from tests.server.conftest import Running, running
from tests.test_llm import SCRIPT

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
CHAT = chat(
    messages=[
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [CALL]},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
        {"role": "user", "content": "greet"},
    ],
    tools=[TOOL], tool_choice="auto", thinking={"type": "enabled"}, reasoning={"effort": "low"}, max_tokens=4, n=1,
    chat_template_kwargs={"thinking": True}, top_p=1, top_k=3, stop=["x"], logprobs=True, top_logprobs=1, seed=1,
    response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}, priority=1,
    stream=True, stream_options={"include_usage": True}, user_id="u",
)  # fmt: skip
COMPLETION = {"model": "scripted", "prompt": ["a", "b"], "suffix": "c", "max_tokens": 2, "logprobs": 1, "n": 1}
ECHO = {"model": "scripted", "prompt": [3, 4, 5], "echo": True, "max_tokens": 0, "logprobs": 1, "stream": True}
TOKENIZE = {"messages": CHAT["messages"], "tools": [TOOL], "return_token_strs": True}
BODIES = [
    ("/chat/completions", CHAT),
    ("/completions", COMPLETION),
    ("/completions", ECHO),
    ("/tokenize", TOKENIZE),
    ("/tokenize", {"prompt": "the cat"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
# Numbers stay small where they would only cost time.
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 2**64, -(2**64), 1e308, float("nan"), float("inf"), 0.5, -1.5]),
    st.sampled_from(
        ["", "auto", "none", "required", "enabled", "assistant", "json_object", "<｜User｜>", "\ud800", "\0"]
    ),
    st.text(max_size=4),
)
LIKE: dict[type, st.SearchStrategy[Any]] = {  # values that are of the right kind at least
    bool: st.booleans(),
    int: st.integers(-1, 20),
    str: st.sampled_from(
        ["", "auto", "none", "required", "greet", "user", "system", "low", "max", "text", "<｜User｜>"]
    ),
    list: st.lists(st.sampled_from([TOOL, CALL, "a", 3, {"role": "user", "content": "greet"}]), max_size=4),
    dict: st.sampled_from([{}, TOOL, {"type": "json_object"}, {"type": "disabled"}, {"effort": "max"}]),
}
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Any]:
    """A path and a body with up to three values replaced, added or taken away."""
    path, body = draw(st.sampled_from(BODIES))
    body = copy.deepcopy(body)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        *way, last = draw(st.sampled_from(list(places(body))[1:] or [("model",)]))
        target = body
        for key in way:
            target = target[key]
        action = draw(st.sampled_from(["replace", "replace", "alike", "alike", "alike", "remove", "add"]))
        if action == "remove":
            del target[last]
        elif action == "add" and isinstance(target, dict):
            target[draw(st.text(max_size=4))] = draw(VALUES)
        elif action == "alike" and type(target[last]) in LIKE:
            target[last] = copy.deepcopy(draw(LIKE[type(target[last])]))
        else:
            target[last] = draw(VALUES)
        if not body:
            break
    return path, body


@pytest.fixture(scope="module")
def small_server() -> Iterator[Running]:
    llm = scripted_llm(SCRIPT | {"<｜begin": "hm</think>ok"}, context=1500)
    with running(llm) as server:
        yield server


def post(server: Running, path: str, body: bytes) -> tuple[int, str]:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def check(status: int, text: str) -> None:
    assert status < 500, text
    if status != 200:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif text.startswith("data: "):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        assert events.pop() == "[DONE]" and not any("error" in json.loads(event) for event in events)
    else:
        assert "error" not in json.loads(text)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged())
def test_damaged_bodies_never_fail_the_server(small_server: Running, damage: tuple[str, Any]) -> None:
    path, body = damage
    check(*post(small_server, path, json.dumps(body).encode()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(BODIES), st.data())
def test_damaged_bytes_never_fail_the_server(
    small_server: Running, whole: tuple[str, Any], data: st.DataObject
) -> None:
    path, body = whole
    text = json.dumps(body).encode()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(at, len(text)))
    check(*post(small_server, path, text[:at] + data.draw(st.binary(max_size=3)) + text[cut:]))


@pytest.mark.parametrize("depth", [100, 900, 960, 990, 5000])
@pytest.mark.parametrize("key", ["metadata", "modle", "messages", "guided_json"])
def test_deep_nesting_never_fails_the_server(small_server: Running, key: str, depth: int) -> None:
    body = json.dumps(chat(max_tokens=1))[:-1] + f', "{key}": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    check(*post(small_server, "/chat/completions", body.encode()))


@cache
def answers() -> tuple[list[Generation], list[list[Delta]]]:
    """Three finished answers, one with a call, and their deltas, token by token."""
    llm = scripted_llm(SCRIPT)
    params = llm.default_params(max_tokens=300, temperature=0.0, logprobs=1)
    generations = [
        llm.prepare_chat(chat(text)["messages"], params, tools=[TOOL] if text == "call" else None)[0]
        for text in ("greet", "call", "plain")
    ]
    deltas: list[list[Delta]] = [[] for _ in generations]
    for generation in generations:
        llm.submit(generation)
    while llm.busy:
        for generation, delta in llm.step():
            deltas[generations.index(generation)].append(delta)
    return generations, deltas


async def told(wire: ChatWire, order: Sequence[int], pauses: Sequence[bool], usage: Usage) -> list[bytes]:
    """The events when the deltas of answers come in this order and are taken after some of them."""
    generations, deltas = answers()
    ticket, left = Ticket(generations, lambda ticket: None), [iter(parts) for parts in deltas]
    events = [event.encode() for event in wire.opening()]
    for position, (index, pause) in enumerate(zip(order, pauses, strict=True)):
        ticket.put(index, next(left[index]))
        end = position == len(order) - 1
        if pause or end:
            parts = await ticket.take(1.0)
            for i, (which, delta) in enumerate(parts):
                last = end and i == len(parts) - 1
                events += [event.encode() for event in wire.feed(which, delta, usage if last else None)]
    return [*events, f"data: {wire.done}\n\n".encode()]


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_events_add_up_to_the_answer_however_they_interleave(data: st.DataObject) -> None:
    generations, deltas = answers()
    usage = Usage(prompt=10, hit=3, output=20, reasoning=5)
    ask = Ask("scripted", (), thinking=True, sampling={"logprobs": 1})
    context = Context("0" * 32, 1_700_000_000, ask, generations, small_tokenizer())
    whole = ChatWire(context).whole([generation.output() for generation in generations], usage)
    seed = data.draw(st.randoms(use_true_random=False))
    order = [i for i, parts in enumerate(deltas) for _ in parts]
    seed.shuffle(order)
    often = data.draw(st.sampled_from([0.02, 0.3, 1.0]))
    stream = b"".join(asyncio.run(told(ChatWire(context), order, [seed.random() < often for _ in order], usage)))
    size = data.draw(st.integers(1, 700))
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=iter(pieces))

    with (
        openai.OpenAI(
            base_url="http://here", api_key="none", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
        ) as client,
        client.chat.completions.stream(model="scripted", messages=[]) as events,
    ):
        chunks = [event.chunk.model_dump() for event in events if event.type == "chunk"]
        made = events.get_final_completion().model_dump()
    assert made["usage"]["prompt_cache_hit_tokens"] == 3 and made["system_fingerprint"] == whole["system_fingerprint"]
    for choice, expected in zip(made["choices"], whole["choices"], strict=True):
        message, wanted = choice["message"], expected["message"]
        assert choice["finish_reason"] == expected["finish_reason"]
        assert (message["role"], message["content"]) == ("assistant", wanted["content"])
        assert message["reasoning_content"] == wanted["reasoning_content"]
        calls = [(call["id"], call["function"]["arguments"]) for call in message["tool_calls"] or []]
        assert calls == [(call["id"], call["function"]["arguments"]) for call in wanted.get("tool_calls", [])]
        parts = [c["choices"][0]["logprobs"] or {} for c in chunks if c["choices"][0]["index"] == choice["index"]]
        for field in ("content", "reasoning_content"):
            spelled = [token["token"] for part in parts for token in part.get(field) or []]
            assert spelled == [token["token"] for token in expected["logprobs"][field]]
