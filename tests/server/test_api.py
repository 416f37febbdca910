from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from hadal.text import own_prompt_texts
from tests.fakes import ScriptedModel, scripted_llm
from tests.server.conftest import Running
from tests.test_llm import SCRIPT

TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=30) as it:
        yield it


def ask(text: str, **options: Any) -> Any:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], "temperature": 0, **options}


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come true within five seconds")


def test_openai_client_gets_a_whole_answer(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(**ask("greet"))
    choice = made.choices[0]
    assert choice.message.content == "Grüße, 世界 👋!" and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "because they met"  # type: ignore[attr-defined]
    usage = made.usage.model_dump()  # type: ignore[union-attr]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["prompt_cache_hit_tokens"] == 0 and usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert made.model == "scripted" and made.object == "chat.completion" and made.id.startswith("chatcmpl-")


def test_openai_client_streams_the_same_answer(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ask("greet"), stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert "".join(d.content or "" for d in deltas) == "Grüße, 世界 👋!"
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "because they met"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 10


EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max", "ultra")


def prompt_tokens(server: Running) -> dict[str, int]:
    made = {e: server.call("/chat/completions", ask("greet", reasoning_effort=e))[1] for e in EFFORTS}
    made["none"] = server.call("/chat/completions", ask("greet"))[1]
    return {effort: body["usage"]["prompt_tokens"] for effort, body in made.items()}


def test_thinking_can_be_switched_off_and_effort_folded(client: openai.OpenAI, server: Running) -> None:
    made = client.chat.completions.create(**ask("plain"), extra_body={"thinking": {"type": "disabled"}})
    assert made.choices[0].message.content == "one. two. three."
    assert "reasoning_content" not in made.choices[0].message.model_dump(exclude_unset=True)
    counts = prompt_tokens(server)
    assert counts["max"] == counts["ultra"] > counts["none"]
    assert {counts[effort] for effort in EFFORTS[:5]} == {counts["none"]}


def test_rules_with_three_efforts_tell_them_apart(start: Callable[..., Any]) -> None:
    texts = dataclasses.replace(own_prompt_texts(), efforts={"low": "", "high": "!", "max": "!!"}, default_effort="low")
    with start(scripted_llm(SCRIPT, texts=texts)) as server:
        counts = prompt_tokens(server)
    assert counts["minimal"] == counts["low"] == counts["high"] - 1
    assert counts["medium"] == counts["high"] == counts["xhigh"] == counts["none"] < counts["max"] == counts["ultra"]


def test_tool_calls_whole_streamed_and_replayed(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(**ask("call"), tools=TOOLS)
    message = made.choices[0].message
    assert made.choices[0].finish_reason == "tool_calls" and message.content == "Let me see."
    call: Any = message.tool_calls[0]  # type: ignore[index]
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Zürich", "days": [1, 2]}
    chunks = list(client.chat.completions.create(**ask("call"), tools=TOOLS, stream=True))
    streamed = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.arguments) for c in streamed] == [(0, call.function.arguments)]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    history: Any = [*ask("call")["messages"], message, {"role": "tool", "tool_call_id": call.id, "content": "greet"}]
    again = client.chat.completions.create(model="scripted", messages=history, tools=TOOLS, temperature=0)
    assert again.choices[0].message.content == "Grüße, 世界 👋!"


def test_stop_and_limits_are_told_apart(client: openai.OpenAI) -> None:
    stopped = client.chat.completions.create(**ask("greet", stop="世")).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("Grüße, ", "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        cut = client.chat.completions.create(**ask("nothing known", **{name: 3}))
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3  # type: ignore[union-attr]


def test_seeds_repeat_an_answer(client: openai.OpenAI) -> None:
    def text(seed: int) -> Any:
        body = ask("<dice>", seed=seed, max_tokens=30) | {"temperature": 2}
        return client.chat.completions.create(**body).choices[0].message.model_dump()["reasoning_content"]

    assert text(1) == text(1) != text(2)


def test_logprobs_of_reasoning_and_content(client: openai.OpenAI) -> None:
    body = ask("greet", logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**body).choices[0].logprobs
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**body, stream=True)]
    for name in ("content", "reasoning_content"):
        tokens = getattr(whole, name)
        parts = [t for part in streamed if part is not None for t in getattr(part, name)]
        assert len(tokens) == len(parts) > 5
        first = tokens[0] if isinstance(tokens[0], dict) else tokens[0].model_dump()
        assert len(first["top_logprobs"]) == 2 and first["top_logprobs"][0]["token"] == first["token"]
        assert first["logprob"] > -1e-5 and bytes(first["bytes"]).decode() == first["token"]


def test_the_last_assistant_message_can_be_continued(client: openai.OpenAI) -> None:
    start: Any = {"role": "assistant", "content": "one. ", "prefix": True}
    messages = [*ask("plain")["messages"], start]
    for thinking in ("enabled", "disabled"):
        body = ask("", messages=messages) | {"extra_body": {"thinking": {"type": thinking}}}
        assert client.chat.completions.create(**body).choices[0].message.content == "two. three."


def test_models_are_listed_in_both_places(client: openai.OpenAI, server: Running) -> None:
    assert [m.id for m in client.models.list()] == ["scripted"]
    assert server.call("/models") == server.call("/v1/models")


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"modle": 1}, "modle", "unknown field `modle`"),
        ({"messages": [{"role": "user", "content": "x", "mood": "low"}]}, "messages[0].mood", "unknown field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "assistant"),
        ({"messages": [{"role": "user"}]}, None, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "text part"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "`tool_call_id`"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "nothing to answer"),
        ({"model": "other"}, "model", "does not exist"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "differ"),
        ({"n": 2}, "n", "1"),
        ({"n": True}, "n", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"messages": [{"role": "assistant", "content": "x", "prefix": 1}]}, "messages[0].prefix", "boolean"),
        ({"messages": [{"role": "assistant", "content": "x", "prefix": True}] * 2}, None, "last text"),
        ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, None, "'prefix'"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'json_object' is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
        ({"stream_options": {"include_usage": True}}, None, "`stream`"),
        ({"top_logprobs": 3}, None, "`logprobs`"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "'enabled' or 'disabled'"),
        ({"reasoning_effort": "furious"}, "reasoning_effort", "'low'"),
        ({"user_id": "a b"}, "user_id", "pattern"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_clear_error(
    server: Running, change: dict[str, Any], param: str | None, words: str
) -> None:
    status, body = server.call("/v1/chat/completions", ask("plain") | change)
    assert status == 400, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["param"] == param
    assert words in body["error"]["message"]


def test_missing_fields_broken_json_and_unknown_paths(server: Running) -> None:
    status, body = server.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert status == 400 and body["error"]["message"] == "field `model` is missing"
    status, body = server.call("/v1/chat/completions", '{"model": ')
    assert status == 400 and "not valid JSON" in body["error"]["message"]
    status, body = server.call("/v1/chat/completions", "[1]")
    assert status == 400 and body["error"]["param"] is None
    status, body = server.call("/v1/unheard-of")
    assert status == 404 and "/v1/unheard-of" in body["error"]["message"]
    status, body = server.call("/v1/chat/completions")
    assert status == 405 and "error" in body


def test_a_prompt_beyond_the_context_is_refused_with_the_sizes(server: Running) -> None:
    status, body = server.call("/v1/chat/completions", ask("word " * 5000))
    assert status == 400 and "the context holds 4096" in body["error"]["message"]


def test_null_fields_count_as_absent(server: Running) -> None:
    message = {"role": "user", "content": "plain", "tool_calls": None, "refusal": None, "audio": None}
    status, body = server.call("/v1/chat/completions", ask("", messages=[message], logit_bias=None, stop=None))
    assert status == 200 and body["choices"][0]["finish_reason"] == "stop"


def test_many_clients_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    def text(i: int) -> bool:
        word, expected = (("greet", "Grüße, 世界 👋!"), ("call", "Let me see."))[i % 2]
        stream = client.chat.completions.create(**ask("x " * i + word), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(text, range(24))) == [True] * 24


def test_a_failing_request_is_an_error_and_not_an_empty_answer(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.chat.completions.create(**ask("broken"))
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(**ask("broken"), stream=True))
    with pytest.raises(openai.InternalServerError, match="server's log"):
        client.chat.completions.create(**ask("<crash>"))
    assert client.chat.completions.create(**ask("greet")).choices[0].finish_reason == "stop"
    assert server.active() == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server: Running, stream: bool) -> None:
    body = json.dumps(ask("endless", stream=stream, max_tokens=100_000)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: server.active() == 1)
    wait_until(lambda: server.active() == 0)


class SlowModel(ScriptedModel):
    pause = 0.1

    def advance(self, *args: Any) -> Any:
        time.sleep(self.pause)
        return super().advance(*args)


def test_slow_answers_are_kept_alive(start: Callable[..., Any]) -> None:
    llm = scripted_llm(SCRIPT, model=SlowModel)
    with start(llm, keep_alive_seconds=0.05) as server:

        def post(body: Any) -> str:
            request = urllib.request.Request(
                server.url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                return str(response.read().decode())

        streamed = post(ask("endless", stream=True, max_tokens=3))
        assert ": keep-alive\n\n" in streamed and streamed.endswith("data: [DONE]\n\n")
        whole = post(ask("endless", max_tokens=3))
        assert whole.startswith("\n") and json.loads(whole)["usage"]["completion_tokens"] == 3
        with pytest.raises(http.client.IncompleteRead):
            post(ask("broken"))
        llm.engine._model.pause = 0.01  # type: ignore[attr-defined]
        called = post(ask("call", stream=True, tools=TOOLS))
        assert ": keep-alive\n\n" in called[called.rindex('"content"') : called.index('"tool_calls"')]


def test_stopping_the_server_does_not_wait_for_endless_answers(start: Callable[..., Any]) -> None:
    llm = scripted_llm(SCRIPT, model=SlowModel)

    outcomes: list[Any] = []

    def post() -> None:
        try:
            outcomes.append(server.call("/chat/completions", ask("endless", max_tokens=1000)))
        except (OSError, ValueError) as error:  # cut off, or a bare 500
            outcomes.append(error)

    with start(llm) as server:
        asking = threading.Thread(target=post)
        asking.start()
        wait_until(lambda: server.active() == 1)
    asking.join(timeout=20)
    assert not asking.is_alive() and not llm.busy
    (outcome,) = outcomes
    assert isinstance(outcome, Exception) or outcome[0] >= 500


def test_a_prompt_sent_again_is_counted_as_a_hit(start: Callable[..., Any]) -> None:
    with start(scripted_llm(SCRIPT)) as server:
        first, again = (server.call("/chat/completions", ask("greet " + "the cat " * 20))[1]["usage"] for _ in range(2))
    assert first["prompt_cache_hit_tokens"] == 0
    assert again["prompt_cache_hit_tokens"] == again["prompt_tokens"] - 1
    assert again["prompt_cache_miss_tokens"] == 1
    assert again["prompt_tokens_details"] == {"cached_tokens": again["prompt_tokens"] - 1}


def test_a_full_queue_turns_requests_away(start: Callable[..., Any]) -> None:
    llm = scripted_llm(SCRIPT, model=SlowModel, max_concurrent=1, max_waiting=1)
    with start(llm) as server:
        asking = [
            threading.Thread(target=lambda: server.call("/chat/completions", ask("endless", max_tokens=30)))
            for _ in range(2)
        ]
        for thread in asking:
            thread.start()
        wait_until(lambda: server.active() == 2)
        status, body = server.call("/chat/completions", ask("greet"))
        assert status == 429 and body["error"]["code"] == "queue_full"
        for thread in asking:
            thread.join(timeout=20)
        assert server.call("/chat/completions", ask("greet"))[0] == 200


def test_an_unforeseen_error_keeps_the_shape_of_errors(start: Callable[..., Any]) -> None:
    llm = scripted_llm(SCRIPT)
    with start(llm) as server:
        llm.default_params = None  # type: ignore[method-assign,assignment]
        status, body = server.call("/chat/completions", ask("plain"))
        assert status == 500 and body["error"]["type"] == "server_error"
        assert set(body["error"]) == {"message", "type", "param", "code"}
